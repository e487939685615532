"""How fast do KV blocks move, and what would the machine allow? `python -m bench.kv [--json FILE]`.

Every transport moves the same bytes between two processes that have a core each, from the sender's memory into the
receiver's, and the sender's clock runs until the receiver has confirmed the last of them; afterwards the bytes are
compared. The arms are interleaved: each round starts each arm's processes anew, in another order, lets them move
everything once to warm up, and measures one pass. Two copies within a process stand beside them as limits.

NIXL takes part where it is installed: `pip install -e '.[nixl]'`.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.kv_arms import BLOCK_BYTES, all_arms
from bench.kv_pair import Arm, ArmError, Measured, open_pair
from bench.kv_side import LATENCY_BYTES, Job
from bench.report import Report, Spread, parser

MIB = 1 << 20
GB = 1e9
LATENCY_WARM_UP = 20
LATENCY_REPEAT = 100

_BEST_OF = {
    "memcpy": ("memcpy",),
    "raw_socket": ("raw_socket",),
    "raw_grpc": ("raw_grpc_sync", "raw_grpc_aio"),
    "grpc": ("grpc",),
    "shm": ("shm",),
    "gloo": ("gloo",),
    "nixl": ("nixl_tcp_read", "nixl_tcp_write"),
    "nixl_shm": ("nixl_shm_read", "nixl_shm_write"),
    "nixl_tuned": ("nixl_tuned_tcp_read", "nixl_tuned_tcp_write"),
    "nixl_tuned_shm": ("nixl_tuned_shm_read", "nixl_tuned_shm_write"),
    "store_to_engine": ("store_to_engine",),
}
"""Key of the results -> the arms of which the best counts."""

_RATIOS = (
    ("grpc", "raw_grpc"),
    ("grpc", "nixl"),
    ("grpc", "nixl_tuned"),
    ("shm", "memcpy"),
    ("shm", "nixl_shm"),
    ("shm", "nixl_tuned_shm"),
    ("store_to_engine", "memcpy"),
)


@dataclass(slots=True)
class Samples:
    """Of one arm and one size of blocks (or messages), a value for each round."""

    gb_s: list[float] = field(default_factory=list)
    sender_cpu_s_per_gb: list[float] = field(default_factory=list)
    receiver_cpu_s_per_gb: list[float] = field(default_factory=list)

    def add(self, job: Job, measured: Measured) -> None:
        size_gb = job.num_bytes * job.repeat / GB
        self.gb_s.append(size_gb / sum(measured.seconds))
        self.sender_cpu_s_per_gb.append(measured.sender_cpu_s / size_gb)
        if measured.receiver_cpu_s is not None:
            self.receiver_cpu_s_per_gb.append(measured.receiver_cpu_s / size_gb)


@dataclass(slots=True)
class ArmResult:
    """Everything about one arm."""

    sizes: dict[int, Samples]
    latency_us: list[float] = field(default_factory=list)

    def of_block(self, block_bytes: int) -> Samples:
        """For blocks of this size; the best of the message sizes where these are free."""
        if block_bytes in self.sizes:
            return self.sizes[block_bytes]
        return max(self.sizes.values(), key=lambda samples: statistics.median(samples.gb_s))


def measure(arm: Arm, num_bytes: int, cores: Sequence[int], result: ArmResult) -> None:
    """One round of one arm. Raises `ArmError`."""
    stamp = 0

    def job(block_bytes: int, num_blocks: int, repeat: int) -> Job:
        nonlocal stamp
        stamp += 1
        return Job(block_bytes=block_bytes, num_blocks=num_blocks, repeat=repeat, stamp=stamp)

    with open_pair(arm, num_bytes, cores) as pair:
        for size, samples in result.sizes.items():
            pair.measure(job(size, num_bytes // size, 1))
            measured_job = job(size, num_bytes // size, 1)
            samples.add(measured_job, pair.measure(measured_job))
        if arm.receiver:
            pair.measure(job(LATENCY_BYTES, 1, LATENCY_WARM_UP))
            seconds = pair.measure(job(LATENCY_BYTES, 1, LATENCY_REPEAT)).seconds
            result.latency_us += [value * 1e6 for value in seconds]


def run(
    arms: Sequence[Arm], rounds: int, num_bytes: int, cores: Sequence[int]
) -> tuple[dict[str, ArmResult], list[str]]:
    """Results by arm, and what is to be said about arms that failed and need not be there."""
    results = {arm.name: ArmResult({size: Samples() for size in arm.block_bytes}) for arm in arms}
    notes = []
    for number in range(rounds):
        for arm in random.Random(number).sample(arms, len(arms)):
            if arm.name not in results:
                continue
            try:
                measure(arm, num_bytes, cores, results[arm.name])
            except ArmError as error:
                if not arm.optional:
                    raise
                del results[arm.name]
                notes.append(f"{arm.name} failed: {error}")
    return results, notes


def rows(results: Mapping[str, ArmResult]) -> list[dict[str, Any]]:
    """One for each arm and size."""
    names = {size: name for name, size in BLOCK_BYTES.items()}
    return [
        {
            "arm": arm,
            "bytes": names.get(size, f"{size >> 10}KiB messages"),
            "gb_s": _spread(samples.gb_s),
            "sender_cpu_s_per_gb": _spread(samples.sender_cpu_s_per_gb),
            "receiver_cpu_s_per_gb": _spread(samples.receiver_cpu_s_per_gb) if samples.receiver_cpu_s_per_gb else "",
            "latency_64k_us": _latency(result) or "",
        }
        for arm, result in results.items()
        for size, samples in result.sizes.items()
    ]


def figures(results: Mapping[str, ArmResult]) -> dict[str, Any]:
    """What is compared: throughput, CPU time and latency under the names of `_BEST_OF`; None for what did not run."""
    best = {key: _best(arms, results) for key, arms in _BEST_OF.items()}
    gbps = {key: {name: _plain(samples.gb_s) for name, samples in of.items()} or None for key, of in best.items()}
    cpu = {
        key: {
            name: {
                "sender": _median(samples.sender_cpu_s_per_gb),
                "receiver": _median(samples.receiver_cpu_s_per_gb),
            }
            for name, samples in of.items()
        }
        or None
        for key, of in best.items()
    }
    latency = {key: _best_latency(arms, results) for key, arms in _BEST_OF.items()}
    return {
        "gbps": gbps,
        "cpu_s_per_gb": cpu,
        "latency_64k_us": {key: value for key, value in latency.items() if value},
        "ratios": _ratios(best),
    }


def _best(arms: Iterable[str], results: Mapping[str, ArmResult]) -> dict[str, Samples]:
    found = [results[arm] for arm in arms if arm in results]
    if not found:
        return {}
    return {
        name: max((result.of_block(size) for result in found), key=lambda samples: statistics.median(samples.gb_s))
        for name, size in BLOCK_BYTES.items()
    }


def _best_latency(arms: Iterable[str], results: Mapping[str, ArmResult]) -> dict[str, float] | None:
    found = [latency for arm in arms if arm in results and (latency := _latency(results[arm]))]
    return min(found, key=lambda latency: latency["p50"], default=None)


def _ratios(best: Mapping[str, Mapping[str, Samples]]) -> dict[str, dict[str, float]]:
    return {
        f"{ours}/{other}": {
            name: round(statistics.median(best[ours][name].gb_s) / statistics.median(best[other][name].gb_s), 3)
            for name in BLOCK_BYTES
        }
        for ours, other in _RATIOS
        if best[ours] and best[other]
    }


def _latency(result: ArmResult) -> dict[str, float] | None:
    if not result.latency_us:
        return None
    centiles = statistics.quantiles(result.latency_us, n=100, method="inclusive")
    return {"p50": round(centiles[49]), "p99": round(centiles[98])}


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def _plain(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def main() -> None:
    """Measure and report."""
    arms = {arm.name: arm for arm in all_arms()}
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--rounds", type=int, default=7, metavar="N", help="passes of each arm (%(default)s)")
    options.add_argument("--mib", type=int, default=256, metavar="N", help="moved in each pass (%(default)s)")
    options.add_argument("--arms", nargs="+", choices=arms, default=list(arms), metavar="ARM", help="some of the arms")
    args = options.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    results, notes = run([arms[name] for name in args.arms], args.rounds, args.mib * MIB, cores)
    report = Report("kv", {"mib": args.mib, "rounds": args.rounds, "cores": cores, "block_bytes": BLOCK_BYTES})
    report.rows = rows(results)
    report.figures = figures(results)
    report.notes = notes + [f"{name}: {ratio}" for name, ratio in report.figures["ratios"].items()]
    if not any(name.startswith("nixl") for name in arms):
        report.notes.append("nixl: not installed")
    report.finish(args.json)


if __name__ == "__main__":
    main()
