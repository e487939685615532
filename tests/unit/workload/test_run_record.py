"""Records of loads, in files and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvrelay.workload.report import summarize
from kvrelay.workload.run_record import RunRecord, RunRecordError, read_record, record_of
from kvrelay.workload.targets import Targets
from tests.support.outcomes import completed, mixed_load


def made(num_requests: int = 100) -> RunRecord:
    outcomes = mixed_load(num_requests)
    return record_of(outcomes, Targets(ttft_s=2.0), name="cost", kind="simulation", config={"speed": 2})


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = made()
    record.write(tmp_path / "a.json")
    assert read_record(tmp_path / "a.json") == record
    assert record.summary == summarize(mixed_load(100), Targets(ttft_s=2.0))


def test_a_load_without_requests_can_be_kept(tmp_path: Path) -> None:
    record = made(0)
    record.write(tmp_path / "a.json")
    assert read_record(tmp_path / "a.json") == record


def test_names_in_the_file_are_those_of_the_summary_with_units(tmp_path: Path) -> None:
    made().write(tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["kind"] == "simulation"
    assert written["summary"]["ttft_s"].keys() == {"mean", "p50", "p90", "p99", "max"}
    assert written["summary"]["goodput"]["targets"]["ttft_s"] == 2.0
    assert {"num_requests", "num_rejected", "requests_per_s", "prefix_hit_rate", "duration_s"} < written[
        "summary"
    ].keys()


def test_distributions_are_quantiles_from_the_lowest_to_the_highest() -> None:
    outcomes = [completed(0.0, float(second)) for second in range(1, 202)]
    distributions = record_of(outcomes, name="a", kind="replay", config={}).distributions
    assert distributions["ttft_s"] == pytest.approx(list(range(1, 202)))
    assert distributions["itl_s"] == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "a"}', '{"rows": []}'])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(RunRecordError, match=r"other\.json is not what --json writes"):
        read_record(path)


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    made().write(path)
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(RunRecordError, match="has format 2"):
        read_record(path)
