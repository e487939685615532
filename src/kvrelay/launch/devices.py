"""Which cores or GPUs does each engine on this machine get?"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_GPU_MEMORY_SHARE = 0.9
_GPU_MEMORY_OPTION = "--gpu-memory-utilization"
_PARALLEL_OPTIONS = ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp")


@dataclass(frozen=True, slots=True)
class Share:
    """What one engine's process is told."""

    environment: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    """For the engine's command line."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What the machine has. `gpus` are ids as CUDA_VISIBLE_DEVICES takes them; none means CPU engines."""

    cores: Sequence[int]
    gpus: Sequence[str] = ()


def detect(environment: Mapping[str, str]) -> Devices:
    """Without loading any driver."""
    return Devices(sorted(os.sched_getaffinity(0)), _gpus(environment))


def shares(devices: Devices, engines: Sequence[Sequence[str]], kv_cache_gib: int) -> list[Share]:
    """One share for each of `engines`, of which the options are given.

    They overlap only where there are fewer devices than ranks.
    """
    num_ranks = [_num_ranks(options) for options in engines]
    if devices.gpus:
        return _gpu_shares(devices.gpus, num_ranks, engines)
    common = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}
    if sum(num_ranks) < 2:
        return [Share(common)] * len(engines)
    cores = iter(_core_shares(devices.cores, sum(num_ranks)))
    return [
        Share({**common, "VLLM_CPU_OMP_THREADS_BIND": "|".join(itertools.islice(cores, size))}) for size in num_ranks
    ]


def _core_shares(cores: Sequence[int], num_ranks: int) -> list[str]:
    """Neighbouring cores, as many for each; what cannot be divided is left to the other processes."""
    size = len(cores) // num_ranks
    if size == 0:
        return [str(cores[index % len(cores)]) for index in range(num_ranks)]
    return [",".join(map(str, cores[index * size : (index + 1) * size])) for index in range(num_ranks)]


def _gpu_shares(gpus: Sequence[str], num_ranks: Sequence[int], engines: Sequence[Sequence[str]]) -> list[Share]:
    """Neighbours, one a rank; the memory of a shared one is divided unless the user says otherwise."""
    chosen = []
    first = 0
    for size in num_ranks:
        if first + size > len(gpus):
            first = 0
        chosen.append(gpus[first : first + size])
        first += size
    num_users = Counter(itertools.chain.from_iterable(chosen))
    given = []
    for group, engine_options in zip(chosen, engines, strict=True):
        most = max(num_users[gpu] for gpu in group)
        options: tuple[str, ...] = ()
        if most > 1 and not any(word.startswith(_GPU_MEMORY_OPTION) for word in engine_options):
            options = (_GPU_MEMORY_OPTION, f"{_GPU_MEMORY_SHARE / most:.2f}")
        given.append(Share({"CUDA_VISIBLE_DEVICES": ",".join(group)}, options))
    return given


def _num_ranks(engine_options: Sequence[str]) -> int:
    words = [part for word in engine_options for part in word.split("=", 1)]
    size = 1
    for option, value in itertools.pairwise(words):
        if option in _PARALLEL_OPTIONS and value.isdecimal():
            size *= int(value)
    return max(1, size)


def _gpus(environment: Mapping[str, str]) -> list[str]:
    if _is_cpu_build():
        return []
    if (chosen := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    nodes = [match[1] for path in Path("/dev").glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", path.name))]
    return [str(index) for index in range(len(nodes))]


def _is_cpu_build() -> bool:
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
