"""`kvrelay simulate` tells how a load would be served, the same each time, and what is wrong with its options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvrelay.cli import app
from kvrelay.cli.failure import UNREACHABLE
from kvrelay.coordinator.scheduler.policies import POLICIES
from kvrelay.simulator.live_cluster import Asked
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2, worker_pb2
from kvrelay.workload.run_record import read_record

NUM_REQUESTS = 30
LAYOUT = cluster_pb2.KvLayout(dtype="bfloat16", num_layers=2, num_kv_heads=3, head_elements=8, block_size_tokens=512)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 200 * number, "input_length": 2000, "output_length": 20, "hash_ids": [1, 2, 3, 100 + number]}
        for number in range(NUM_REQUESTS)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def simulate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_the_load(trace: Path, policy: str) -> None:
    result = simulate(trace, "--prefill", "2", "--decode", "2", "--policy", policy)
    assert result.exit_code == 0, result.output
    assert "Prefix hits:" in result.output
    assert "Workers for prefill: busy" in result.output


def test_results_are_written_and_the_same_each_time(trace: Path, tmp_path: Path) -> None:
    records = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.json"
        options = ("--prefill", "1", "--decode", "1", "--both", "1", "--coordinators", "2", "--seed", "3")
        result = simulate(trace, *options, "--name", "x", "--json", path, "--plots", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name / "load.png").stat().st_size > 1000
        records.append(read_record(path))
    first, second = records
    assert first == second
    assert first.kind == "simulation"
    assert first.summary.num_completed == NUM_REQUESTS
    assert first.details["num_split"] + first.details["num_local"] == NUM_REQUESTS
    assert first.config["policy"] == "cost"


def test_times_of_a_worker_are_taken_from_a_file(trace: Path, tmp_path: Path) -> None:
    times, path = tmp_path / "times.json", tmp_path / "out.json"
    times.write_text(json.dumps({"prefill_fixed_s": 0.0, "prefill_token_s": 0.001, "step_fixed_s": 0.0}))
    result = simulate(trace, "--limit", "1", "--times", times, "--json", path)
    assert result.exit_code == 0, result.output
    # 2,000 tokens, and two or three messages of a millisecond.
    assert read_record(path).summary.ttft_s.p50 == pytest.approx(2.0, abs=0.01)


def test_targets_are_enforced_when_asked_for(trace: Path) -> None:
    options = (trace, "--prefill", "1", "--decode", "1", "--policy", "cost", "--targets", "ttft=0.001")
    result = simulate(*options, "--enforce-targets")
    assert result.exit_code == 1
    assert "no request was completed" in result.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--decode", "0"), "there is no decode worker"),
        (("--max-batched-tokens", "100"), "every running sequence needs a token of each step"),
        (("--times", "nowhere.json"), "--times nowhere.json cannot be read: No such file"),
        (("--json", "/nowhere/x.json"), "there is no folder to write that file into"),
        (("--live", "--hardware", "a100"), "--live says what steps take"),
        (("--etcd", "127.0.0.1:1"), "give --live, too"),
        (("--cluster", "mine"), "give --live, too"),
    ],
)
def test_wrong_options_are_told(trace: Path, options: tuple[str, ...], told: str) -> None:
    result = simulate(trace, *options)
    assert result.exit_code == 2
    assert told in result.output


def test_workers_that_nobody_can_ask_are_told(trace: Path) -> None:
    result = simulate(trace, "--live", "--etcd", "127.0.0.1:1")
    assert result.exit_code == UNREACHABLE
    assert "no etcd answers at 127.0.0.1:1" in result.output


def test_workers_are_like_those_of_a_running_cluster(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Sequence[str], str]] = []

    async def ask_workers(etcd: Sequence[str], cluster: str, timeout_s: float) -> Sequence[Asked]:
        asked.append((etcd, cluster))
        info = cluster_pb2.WorkerInfo(role=cluster_pb2.ROLE_BOTH, layout=LAYOUT, max_batched_tokens=512)
        times = StepTimes(prefill_token_s=0.001, num_prefills=10, step_fixed_s=0.05, num_steps=20)
        return [(info, worker_pb2.WorkerStatus(step_times=times.to_proto()))]

    monkeypatch.setattr("kvrelay.cli.live_workers.ask_workers", ask_workers)
    path = tmp_path / "out.json"
    result = simulate(trace, "--limit", "1", "--live", "--etcd", "10.0.0.1:2379", "--cluster", "mine", "--json", path)
    assert result.exit_code == 0, result.output
    assert "measured over 10 prompts and 20 steps" in result.output
    assert asked == [(["10.0.0.1:2379"], "mine")]
    record = read_record(path)
    assert record.summary.tpot_s.p50 == pytest.approx(0.05, rel=0.01)
    assert (record.config["hardware"], record.config["max_batched_tokens"]) == (None, 512)


def test_a_file_that_is_no_trace_is_told(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("hello\n")
    result = simulate(path)
    assert result.exit_code == 2
    assert "neither JSON" in result.output
