"""Which scheduling policy serves recorded loads best? Traces of Mooncake in the simulator, faster and faster.

All policies get the same cluster, by default 8 prefill and 16 decode workers, each of eight H100 with Llama 2 70B (as
measured). "always split" and "never split" are the policy "cost" without its choice whether decode workers compute
prompts. As decode workers alone are fewer than all, these three are compared again where every worker has both roles.

A policy keeps up with a load when 95 % of its requests have ended by the time the last one arrives.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Literal

from bench.policy_findings import findings
from bench.report import Report, parser
from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.policies import POLICIES, make_scheduler
from kvrelay.simulator.config import ClusterConfig
from kvrelay.simulator.details import details_of
from kvrelay.simulator.known_times import HARDWARE, known_times
from kvrelay.simulator.simulation import simulate
from kvrelay.workload.axes import save
from kvrelay.workload.comparison_plots import sweep_figure
from kvrelay.workload.outcome import Status
from kvrelay.workload.report import Summary, summarize
from kvrelay.workload.targets import Targets
from kvrelay.workload.trace import TraceOptions, TraceRequest, read_trace

TRACES_VARIABLE = "KVRELAY_TRACES"
SPEEDS = {
    "mooncake_conversation": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0),
    "mooncake_synthetic": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
}
TARGETS = Targets(ttft_s=2.0, tpot_s=0.1)
_NO_BOUNDS = AdmissionConfig(max_requests=1_000_000, max_tokens=10**12, max_tenant_share=1.0)
"""Nothing is rejected: policies that keep up less would look better for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What is compared."""

    name: str
    policy: str = "cost"
    local_prefill: Literal["when-cheaper", "never", "always"] = "when-cheaper"
    all_both: bool = False
    """All workers have both roles."""


_SPLITS = (
    Arm(name="cost"),
    Arm(name="always split", local_prefill="never"),
    Arm(name="never split", local_prefill="always"),
)
ARMS = (
    *(Arm(name=policy, policy=policy) for policy in POLICIES if policy != "cost"),
    *_SPLITS,
    *(replace(arm, all_both=True) for arm in _SPLITS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One simulation."""

    trace: Path
    speed: float
    limit: int | None
    arm: Arm
    seed: int
    num_prefill: int
    num_decode: int
    hardware: str
    cost: CostConfig

    @property
    def cluster(self) -> ClusterConfig:
        num_all = self.num_prefill + self.num_decode
        if self.arm.all_both:
            return ClusterConfig(num_prefill=0, num_decode=0, num_both=num_all, admission=_NO_BOUNDS, seed=self.seed)
        return ClusterConfig(
            num_prefill=self.num_prefill, num_decode=self.num_decode, admission=_NO_BOUNDS, seed=self.seed
        )

    @property
    def cluster_name(self) -> str:
        cluster = self.cluster
        return f"{cluster.num_both} both" if cluster.num_both else f"{cluster.num_prefill}P+{cluster.num_decode}D"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    point: Point
    summary: Summary
    details: Mapping[str, Any]


def run(point: Point) -> Result:
    """In a process of its own, if wanted."""
    requests = _requests(point.trace, point.speed, point.limit)
    config, arm = point.cluster, point.arm
    scheduler = make_scheduler(arm.policy, point.seed, replace(point.cost, local_prefill=arm.local_prefill))
    simulated = simulate(requests, config, known_times(point.hardware), [scheduler], Targets())
    last_s = requests[-1].arrived_s
    completed = [outcome for outcome in simulated.outcomes if outcome.status is Status.COMPLETED]
    num_ended = sum(outcome.token_times_s[-1] <= last_s for outcome in completed)
    details = details_of(simulated, requests, config.hardware.block_tokens)
    details["ended_share"] = num_ended / len(requests)
    return Result(point=point, summary=summarize(simulated.outcomes, TARGETS), details=details)


@lru_cache(maxsize=1)
def _requests(trace: Path, speed: float, limit: int | None) -> Sequence[TraceRequest]:
    return read_trace(trace, TraceOptions(limit=limit, speed=speed))


def figures_of(result: Result) -> dict[str, Any]:
    """Of one simulation; seconds, and shares of one."""
    point, summary, details = result.point, result.summary, result.details
    idle = details["idle_while_waiting_share"]
    return {
        "trace": point.trace.stem,
        "cluster": point.cluster_name,
        "speed": point.speed,
        "requests_per_s": summary.offered_requests_per_s,
        "policy": point.arm.name,
        "seed": point.seed,
        "ttft_p50_s": summary.ttft_s.p50,
        "ttft_p90_s": summary.ttft_s.p90,
        "ttft_p99_s": summary.ttft_s.p99,
        "tpot_p50_s": summary.tpot_s.p50,
        "tpot_p90_s": summary.tpot_s.p90,
        "itl_p99_s": summary.itl_s.p99,
        "e2e_p50_s": summary.e2e_s.p50,
        "e2e_p90_s": summary.e2e_s.p90,
        "goodput_share": summary.goodput.share,
        "hit_rate": summary.prefix_hit_rate,
        "oracle_hit_share": details["oracle_hit_share"],
        "ended_share": details["ended_share"],
        "idle_prefill": idle.get("prefill", idle.get("both")),
        "idle_decode": idle.get("decode", idle.get("both")),
        "busy": details["busy_share"],
        "local_share": details["num_local"] / (details["num_local"] + details["num_split"]),
    }


def row_of(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds of one arm at one load."""
    first = figures[0]
    shown = {
        "TTFT p50": "ttft_p50_s",
        "p90": "ttft_p90_s",
        "p99": "ttft_p99_s",
        "TPOT p90": "tpot_p90_s",
        "ITL p99": "itl_p99_s",
        "e2e p90": "e2e_p90_s",
        "goodput": "goodput_share",
        "of oracle's hits": "oracle_hit_share",
        "ended": "ended_share",
        "idle P": "idle_prefill",
        "idle D": "idle_decode",
        "local": "local_share",
    }
    return {
        "trace": first["trace"].removeprefix("mooncake_")[:6],
        "cluster": first["cluster"],
        "load": f"x{first['speed']:g}",
        "policy": first["policy"],
        **{title: median(each[name] for each in figures) for title, name in shown.items()},
    }


def points(options: argparse.Namespace) -> Iterator[Point]:
    """Trace by trace and load by load; seeds only tell how much is chance, so most arms have one."""
    for name, speeds in SPEEDS.items():
        for speed in options.speeds or speeds:
            for arm in ARMS:
                if options.arms and arm.name not in options.arms:
                    continue
                for seed in range(options.seeds if arm.policy == "cost" else 1):
                    yield Point(
                        trace=options.traces / f"{name}.jsonl",
                        speed=speed,
                        limit=options.limit,
                        arm=arm,
                        seed=seed,
                        num_prefill=options.prefill,
                        num_decode=options.decode,
                        hardware=options.hardware,
                        cost=CostConfig(**dict(options.cost)),
                    )


def plot(results: Sequence[Result], directory: Path) -> list[Path]:
    """Of each trace all policies, and "cost" with and without a choice; of the first seed."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    split = ("cost", "always split", "never split")
    for trace in dict.fromkeys(result.point.trace.stem for result in results):
        for title, names, all_both in (
            ("policies", tuple(POLICIES), False),
            ("splitting", split, False),
            ("splitting, all workers with both roles", split, True),
        ):
            series = {
                name: [
                    (result.summary.offered_requests_per_s or 0.0, result.summary)
                    for result in sorted(results, key=lambda result: result.point.speed)
                    if (result.point.trace.stem, result.point.arm.name) == (trace, name)
                    and (result.point.arm.all_both, result.point.seed) == (all_both, 0)
                ]
                for name in names
            }
            path = directory / f"{trace}-{title.split()[0]}{'-both' * all_both}.png".replace(",", "")
            save(sweep_figure(f"{trace}: {title}", "requests per second", series), path)
            written.append(path)
    return written


def main() -> None:
    options = _options()
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = Report("policies", {**config, "targets": asdict(TARGETS)})
    results = []
    with ProcessPoolExecutor(options.processes) as pool:
        for result in pool.map(run, points(options)):
            results.append(result)
            point = result.point
            done = f"{point.trace.stem} x{point.speed:g} {point.cluster_name} {point.arm.name} seed {point.seed}"
            print(f"{done}: TTFT p90 {result.summary.ttft_s.p90:.3f} s", file=sys.stderr, flush=True)
    figures = report.figures["points"] = [figures_of(result) for result in results]
    for _, of_arm in groupby(figures, key=itemgetter("trace", "speed", "cluster", "policy")):
        report.rows.append(row_of(list(of_arm)))
    report.figures["findings"] = found = findings(figures)
    report.notes += [note for each in found for note in each["notes"]]
    if options.plots:
        report.notes += [f"Written: {path}" for path in plot(results, options.plots)]
    report.finish(options.json)


def _cost_field(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in CostConfig.__slots__ or name == "local_prefill":
        raise argparse.ArgumentTypeError(f"{name!r} is no number of the policy cost")
    return name, float(value)


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    default = os.environ.get(TRACES_VARIABLE)
    options.add_argument(
        "--traces",
        type=Path,
        default=default and Path(default),
        required=default is None,
        metavar="DIR",
        help=f"where {' and '.join(f'{name}.jsonl' for name in SPEEDS)} are; by default what {TRACES_VARIABLE} names",
    )
    options.add_argument("--plots", type=Path, metavar="DIR", help="draw the sweeps there")
    options.add_argument("--limit", type=int, help="only the first so many requests of each trace")
    options.add_argument("--speeds", type=float, nargs="+", help="of the traces; by default from idle to overloaded")
    options.add_argument("--arms", nargs="+", metavar="ARM", choices=[arm.name for arm in ARMS], help="only these")
    options.add_argument("--seeds", type=int, default=3, help="of the arms of cost")
    options.add_argument("--prefill", type=int, default=8, help="prefill workers")
    options.add_argument("--decode", type=int, default=16, help="decode workers")
    options.add_argument("--hardware", choices=HARDWARE, default=HARDWARE[0])
    options.add_argument(
        "--cost", type=_cost_field, action="append", default=[], metavar="NAME=VALUE", help="tune the policy cost"
    )
    options.add_argument("--processes", type=int, default=1, help="simulations at a time")
    return options.parse_args()


if __name__ == "__main__":
    main()
