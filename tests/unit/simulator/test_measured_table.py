"""Measurements are met where they are, and go on sensibly where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrelay.simulator.measured_table import Measured, TableError, TableTimes, read_table
from kvrelay.simulator.timing import Chunk

HEAD = "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,token_time,e2e_time"
ROWS = [
    Measured(128, 1, 0.05, 0.030),
    Measured(512, 1, 0.10, 0.030),
    Measured(512, 2, 0.18, 0.032),
    Measured(512, 8, 0.80, 0.040),
    Measured(4096, 1, 1.00, 0.034),
]


def test_measured_batches_of_short_prompts_are_met() -> None:
    times = TableTimes(ROWS)
    for row in ROWS[:4]:
        chunks = [Chunk(row.num_prompt_tokens, 0)] * row.num_requests
        assert times.prefill_s(chunks) == pytest.approx(row.prompt_s)
        if row.num_prompt_tokens == 512:
            context = row.num_requests * row.num_prompt_tokens
            assert times.steps_s(row.num_requests, context, 1)[0] == pytest.approx(row.token_s, rel=0.02)


def test_a_long_prompt_takes_what_it_took() -> None:
    times = TableTimes(ROWS)
    assert times.prefill_s([Chunk(4096, 0)]) == pytest.approx(1.0)
    assert times.steps_s(1, 4096, 1)[0] == pytest.approx(0.034, rel=0.02)


def test_more_is_never_faster() -> None:
    noisy = [Measured(128, 1, 0.06, 0.03), Measured(256, 1, 0.05, 0.03), Measured(512, 1, 0.1, 0.03), *ROWS[2:]]
    times = TableTimes(noisy)
    sizes = [1, 100, 128, 200, 256, 300, 512, 2000, 4096, 10_000, 50_000]
    prefills_s = [times.prefill_s([Chunk(size, 0)]) for size in sizes]
    assert prefills_s == sorted(prefills_s)
    steps_s = [float(times.steps_s(count, count * 100, 1)[0]) for count in (1, 2, 3, 8, 16, 100)]
    assert steps_s == sorted(steps_s)


def test_beyond_the_table_it_goes_on_as_at_its_end() -> None:
    times = TableTimes(ROWS)
    slope = (0.80 - 0.18) / (8 * 512 - 2 * 512)
    chunks = [Chunk(256, 0)] * 32
    assert times.prefill_s(chunks) == pytest.approx(0.80 + slope * (32 * 256 - 8 * 512))


def test_reading_takes_medians_of_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = [f"m,h,512,1,128,1,1,{prompt},{token},1,8" for prompt, token in ((90, 30), (100, 31), (500, 99))]
    path.write_text("\n".join([f"{HEAD},tensor_parallel", *rows, "m,h,512,1,128,1,1,1,1,1,4"]))
    times = read_table(path, model="m", hardware="h", tensor_parallel=8)
    assert times.prefill_s([Chunk(512, 0)]) == pytest.approx(0.1)
    assert times.steps_s(1, 0, 1)[0] == pytest.approx(0.031)


def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"{HEAD},tensor_parallel\nm,h,512,1,128,1,1,90,30,1,8\n")
    with pytest.raises(TableError, match="no times of m on x x 8; it has m on h x 8"):
        read_table(path, model="m", hardware="x", tensor_parallel=8)
    path.write_text(f"{HEAD},tensor_parallel\nm,h,512,1,128,1,1,ninety,30,1,8\n")
    with pytest.raises(TableError, match="line 2"):
        read_table(path, model="m", hardware="h", tensor_parallel=8)
