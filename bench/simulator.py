"""Does the simulator say what a real cluster does? The same loads on both, one prefill and one decode worker.

`kvrelay up` with vLLM on the CPU, and random prompts of 32 to 1,000 tokens that come at random times, at shares of what
the prefill worker can compute. While such a load is served, workers are asked again and again what prompts and steps
take, as `kvrelay simulate --live` asks; the simulator then gets the same load and the means of these answers. It also
gets the means of the other loads of the round: that predicts a load that nobody measured. All loads are served in
turns, several times and with other prompts each time, since machines have slow minutes; ratios are medians over rounds.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, median
from typing import Any

import uvloop

from bench.cluster import measured_cluster
from bench.report import Report, parser
from kvrelay.client.http_pool import Origin
from kvrelay.client.replay.planning import Fit
from kvrelay.client.replay.session import ReplayConfig, open_replay
from kvrelay.client.workers import ask_workers
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.coordinator.scheduler.policies import make_scheduler
from kvrelay.launch.state import RunningCluster
from kvrelay.simulator.config import ClusterConfig
from kvrelay.simulator.live_cluster import LiveWorkers, like_workers
from kvrelay.simulator.simulation import simulate
from kvrelay.simulator.timing import FormulaTimes
from kvrelay.step_times.model import StepTimes
from kvrelay.workload.outcome import Outcome, Status
from kvrelay.workload.report import Summary, summarize
from kvrelay.workload.targets import Targets
from kvrelay.workload.trace import TraceRequest

PROMPT_TOKENS = (32, 1000)
OUTPUT_TOKENS = (8, 32)
_ASK_EVERY_S = 1.0
_VOCAB_SIZE = 40_000
_COEFFICIENTS = tuple(field.name for field in fields(StepTimes) if field.name.endswith("_s"))
_FIGURES: Mapping[str, Callable[[Summary], float | None]] = {
    "ttft_p50": lambda summary: summary.ttft_s.p50,
    "ttft_p90": lambda summary: summary.ttft_s.p90,
    "itl_p50": lambda summary: summary.itl_s.p50,
    "tpot_p50": lambda summary: summary.tpot_s.p50,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One load on the real cluster, and what its workers were like meanwhile."""

    share: float
    requests: Sequence[TraceRequest]
    outcomes: Sequence[Outcome]
    workers: LiveWorkers


def load_of(num_requests: int, gap_s: float, seed: int) -> list[TraceRequest]:
    """Prompts of log-uniform lengths that come by a Poisson process, stretched to the mean gap that is wanted."""
    numbers = random.Random(seed)
    low, high = (math.log(bound) for bound in PROMPT_TOKENS)
    arrivals, requests = 0.0, []
    for index in range(num_requests):
        requests.append(
            TraceRequest(
                index=index,
                arrived_s=arrivals,
                num_prompt_tokens=round(math.exp(numbers.uniform(low, high))),
                num_output_tokens=numbers.randint(*OUTPUT_TOKENS),
            )
        )
        arrivals += numbers.expovariate(1.0)
    stretch = gap_s * num_requests / arrivals
    return [replace(request, arrived_s=request.arrived_s * stretch) for request in requests]


def gap_for(share: float, times: StepTimes, num_requests: int, seed: int) -> float:
    """Between two arrivals, so that prompts take this share of the prefill worker's time."""
    return fmean(times.prefill_s(request.num_prompt_tokens) for request in load_of(num_requests, 1.0, seed)) / share


async def serve(cluster: RunningCluster, share: float, requests: Sequence[TraceRequest], seed: int) -> Served:
    """Raises `RuntimeError` when a request is not completed."""
    told: list[LiveWorkers] = []

    async def ask() -> None:
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            told.append(like_workers(await ask_workers(cluster.etcd, cluster.cluster, _ASK_EVERY_S)))

    config = ReplayConfig(origin=Origin.parse(cluster.http_url), fit=Fit(vocab_size=_VOCAB_SIZE, seed=seed))
    async with open_replay(requests, config) as replay, asyncio.TaskGroup() as group:
        asking = group.create_task(ask())
        replayed = await replay.loop.run(replay.plan.requests, asyncio.Event())
        asking.cancel()
    if failed := [outcome.error for outcome in replayed.outcomes if outcome.status is not Status.COMPLETED]:
        raise RuntimeError(f"{len(failed)} requests were not answered, the first one for: {failed[0]}")
    workers = replace(told[-1], times=mean_times([one.times for one in told]))
    return Served(share=share, requests=requests, outcomes=replayed.outcomes, workers=workers)


def mean_times(times: Sequence[StepTimes]) -> StepTimes:
    """Of each coefficient."""
    means: dict[str, Any] = {name: fmean(getattr(one, name) for one in times) for name in _COEFFICIENTS}
    return replace(times[-1], **means)


def simulated(served: Served, times: StepTimes) -> Summary:
    """The same load in the simulator, every prompt handed over, as in the real cluster."""
    engine, hardware = served.workers.engine, served.workers.hardware
    config = ClusterConfig(num_prefill=1, num_decode=1, engine=engine, hardware=hardware)
    scheduler = make_scheduler("cost", 0, CostConfig(local_prefill="never"))
    return summarize(simulate(served.requests, config, FormulaTimes(times), [scheduler], Targets()).outcomes)


def compare(served: Served, others: Sequence[Served], number: int) -> dict[str, Any]:
    """Milliseconds of the cluster and the simulator, and what the simulator says over what was measured."""
    row: dict[str, Any] = {"load": served.share, "round": number}
    measured = summarize(served.outcomes)
    told = simulated(served, served.workers.times)
    predicted = simulated(served, mean_times([one.workers.times for one in others])) if others else None
    for name, figure in _FIGURES.items():
        measured_s, told_s = figure(measured), figure(told)
        assert measured_s is not None
        assert told_s is not None
        row |= {f"{name}_ms": measured_s * 1e3, f"{name}_sim_ms": told_s * 1e3, f"{name}_ratio": told_s / measured_s}
        if predicted is not None:
            predicted_s = figure(predicted)
            assert predicted_s is not None
            row[f"{name}_predicted_ratio"] = predicted_s / measured_s
    return row


def by_load(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds."""
    return [
        {name: median(row[name] for row in rows if row["load"] == share) for name in rows[0] if name != "round"}
        for share in dict.fromkeys(row["load"] for row in rows)
    ]


def farthest(rows: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    """The ratio of this kind that is farthest from one."""
    ratios = [row[f"{name}_{kind}"] for row in rows for name in _FIGURES if f"{name}_{kind}" in row]
    return max(ratios, key=lambda ratio: abs(math.log(ratio)), default=None)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--loads", type=float, nargs="+", default=[0.2, 0.4, 0.6], metavar="SHARE", help="of the prefill worker's time"
    )
    options.add_argument("--requests", type=int, default=100, help="of each load and round")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seed", type=int, default=1, help="of lengths and arrivals in the first round")
    given = options.parse_args()
    rows = []
    with measured_cluster(engine_options=("--max-model-len", "2048")) as cluster:
        uvloop.run(serve(cluster, 0.0, load_of(20, 1.0, given.seed), 0))  # Warms up.
        times = uvloop.run(serve(cluster, 0.0, load_of(60, 0.5, given.seed), 1)).workers.times
        for number in range(given.rounds):
            seed = given.seed + number
            of_round = []
            for place, share in enumerate(given.loads):
                requests = load_of(given.requests, gap_for(share, times, given.requests, seed), seed)
                prompts_seed = 2 + number * len(given.loads) + place
                _say(f"load {share:g}, round {number}: serving for {requests[-1].arrived_s:.0f} s and more")
                of_round.append(uvloop.run(serve(cluster, share, requests, prompts_seed)))
            for served in of_round:
                row = compare(served, [one for one in of_round if one is not served], number)
                rows.append(row)
                ratios = ", ".join(f"{name} {row[f'{name}_ratio']:.2f}" for name in _FIGURES)
                _say(f"load {served.share:g}, round {number}: simulated over measured: {ratios}")
    config = {name: value for name, value in vars(given).items() if name != "json"}
    report = Report("simulator", {**config, "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS})
    report.rows = by_load(rows)
    report.figures["rounds"] = rows
    report.figures["farthest_ratio"] = farthest(report.rows, "ratio")
    report.figures["farthest_predicted_ratio"] = farthest(report.rows, "predicted_ratio")
    report.notes.append("Ratios: simulated over measured; predicted: with what workers took at the other loads.")
    report.finish(given.json)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
