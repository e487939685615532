"""Traces are read as they were recorded, scaled as asked, and refused with the line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.workload.trace import TraceError, TraceOptions, TraceRequest, read_trace, scaled

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace"
    path.write_text("\n".join(lines))
    return path


def mooncake(timestamp_ms: int, num_tokens: int, *ids: int, output: int = 5) -> str:
    record = {"timestamp": timestamp_ms, "input_length": num_tokens, "output_length": output, "hash_ids": ids}
    return json.dumps(record)


def test_mooncake(tmp_path: Path) -> None:
    requests = read_trace(written(tmp_path, mooncake(100, 1000, 0, 1, output=7), "", mooncake(1600, 512, 0)))
    assert requests == [
        TraceRequest(index=0, arrived_s=0.0, num_prompt_tokens=1000, num_output_tokens=7, block_ids=(0, 1)),
        TraceRequest(index=1, arrived_s=1.5, num_prompt_tokens=512, num_output_tokens=5, block_ids=(0,)),
    ]


def test_azure(tmp_path: Path) -> None:
    requests = read_trace(
        written(tmp_path, f"{AZURE}\r", "2023-11-16 18:17:03.9799600,4808,10\r", "2023-11-16 18:17:05.9799600,3,8\r")
    )
    assert [(r.arrived_s, r.num_prompt_tokens, r.num_output_tokens) for r in requests] == [(0, 4808, 10), (2, 3, 8)]
    assert not requests[0].block_ids


def test_requests_come_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    requests = read_trace(written(tmp_path, mooncake(900, 1, 1), mooncake(400, 2, 2)))
    assert [(r.index, r.arrived_s, r.num_prompt_tokens) for r in requests] == [(0, 0.0, 2), (1, 0.5, 1)]


def test_limit_and_speed(tmp_path: Path) -> None:
    path = written(tmp_path, *(mooncake(1000 * i, 1, i) for i in range(5)))
    assert [r.arrived_s for r in read_trace(path, TraceOptions(limit=3, speed=4))] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ((), "no requests"),
        ((AZURE,), "no requests"),
        (("hello",), "line 1: neither JSON .* 'hello'"),
        ((mooncake(0, 1, 1), "{"), "line 2: "),
        ((mooncake(0, 1, 1), "[1]"), "line 2: not an object"),
        ((mooncake(0, 513, 1),), "line 1: 1 hash_ids for 513 tokens; .* must be 2"),
        ((mooncake(0, 0),), "line 1: input_length is 0"),
        ((mooncake(0, 1, -4),), "line 1: hash_ids"),
        (('{"timestamp": 0, "input_length": 5}',), "line 1: 'hash_ids' is missing"),
        ((AZURE, "2023-11-16 18:17:03,7,1", "2023-11-16 18:17:03,many,1"), "line 3: ContextTokens is 'many'"),
        ((AZURE, "yesterday,7,1"), "line 2: .*yesterday"),
        ((AZURE, "2023-11-16 18:17:03,7"), "line 2: GeneratedTokens is None"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, lines: tuple[str, ...], told: str) -> None:
    with pytest.raises(TraceError, match=told):
        read_trace(written(tmp_path, *lines))


def test_bytes_are_no_trace(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not text"):
        read_trace(tmp_path / "trace")


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"speed": 0}, {"length_scale": -1}])
def test_options_that_mean_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TraceOptions(**wrong)


@given(num_tokens=st.integers(1, 5000), output=st.integers(1, 5000), scale=st.floats(0.5, 600))
def test_scaled_requests_keep_their_blocks(num_tokens: int, output: int, scale: float) -> None:
    ids = tuple(range(-(-num_tokens // 512)))
    request = TraceRequest(index=0, arrived_s=0, num_prompt_tokens=num_tokens, num_output_tokens=output, block_ids=ids)
    smaller = scaled(request, TraceOptions(length_scale=scale))
    assert smaller.block_ids == ids
    assert (len(ids) - 1) * smaller.block_tokens < smaller.num_prompt_tokens <= len(ids) * smaller.block_tokens
    assert smaller.num_output_tokens >= 1
