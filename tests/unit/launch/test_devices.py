"""Engines side by side do not take each other's cores or GPUs."""

from __future__ import annotations

import os

import pytest

from kvrelay.launch.devices import Devices, Share, detect, shares

BIND = "VLLM_CPU_OMP_THREADS_BIND"


def _bindings(cores: list[int], num_engines: int) -> list[str | None]:
    return [share.environment.get(BIND) for share in shares(Devices(cores), [[]] * num_engines, 1)]


def test_one_engine_keeps_all_cores() -> None:
    assert _bindings([0, 1, 2, 3], 1) == [None]


def test_two_engines_on_two_cores_have_one_each() -> None:
    assert _bindings([0, 1], 2) == ["0", "1"]


def test_neighbouring_cores_are_shared_equally() -> None:
    assert _bindings([0, 1, 2, 3, 4], 2) == ["0,1", "2,3"]


def test_cores_need_not_begin_at_zero() -> None:
    assert _bindings([4, 6], 2) == ["4", "6"]


def test_more_engines_than_cores_take_turns() -> None:
    assert _bindings([0, 1], 3) == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("cores", "bindings"),
    [([0, 1, 2], ["0|1", "2"]), ([0, 1], ["0|1", "0"]), (list(range(7)), ["0,1|2,3", "4,5"]), ([3], ["3|3", "3"])],
)
def test_each_rank_has_its_own_cores(cores: list[int], bindings: list[str]) -> None:
    given = shares(Devices(cores), [["--tensor-parallel-size", "2"], []], 1)
    assert [share.environment[BIND] for share in given] == bindings


def test_the_ranks_of_the_only_engine_divide_the_cores() -> None:
    (share,) = shares(Devices([0, 1, 2, 3]), [["-tp", "2"]], 1)
    assert share.environment[BIND] == "0,1|2,3"


def test_the_kv_cache_of_a_cpu_engine() -> None:
    (share,) = shares(Devices([0]), [[]], 3)
    assert share.environment["VLLM_CPU_KVCACHE_SPACE"] == "3"


def test_a_gpu_each() -> None:
    given = shares(Devices([0], ["0", "1"]), [[], []], 1)
    assert given == [Share({"CUDA_VISIBLE_DEVICES": "0"}), Share({"CUDA_VISIBLE_DEVICES": "1"})]


@pytest.mark.parametrize("options", [["--tensor-parallel-size", "2"], ["-tp=2"], ["--pipeline-parallel-size=2"]])
def test_parallel_engines_take_several_gpus(options: list[str]) -> None:
    given = shares(Devices([0], ["0", "1", "2", "3"]), [options] * 2, 1)
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in given] == ["0,1", "2,3"]


def test_engines_of_different_sizes_take_the_gpus_one_after_the_other() -> None:
    given = shares(Devices([0], ["0", "1", "2", "3"]), [["-tp", "2"], [], []], 1)
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in given] == ["0,1", "2", "3"]
    assert [share.options for share in given] == [()] * 3


def test_only_a_gpu_that_is_shared_is_divided() -> None:
    given = shares(Devices([0], ["0", "1", "2"]), [["-tp", "2"], [], []], 1)
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in given] == ["0,1", "2", "0"]
    assert [share.options[-1:] for share in given] == [("0.45",), (), ("0.45",)]


def test_engines_on_one_gpu_divide_its_memory() -> None:
    given = shares(Devices([0], ["0"]), [[], []], 1)
    assert [share.options for share in given] == [("--gpu-memory-utilization", "0.45")] * 2


def test_unless_the_user_says_how_much() -> None:
    given = shares(Devices([0], ["0"]), [["--gpu-memory-utilization=0.3"]] * 2, 1)
    assert [share.options for share in given] == [()] * 2


def test_detects_the_cores_of_this_process() -> None:
    assert set(detect({}).cores) == os.sched_getaffinity(0)
