"""`kvrelay simulate`: how would a cluster that is not there serve a recorded load?"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli.failure import FAILED, WRONG_USAGE, fail
from kvrelay.cli.load_options import (
    DEFAULT_TARGETS,
    LOAD,
    JsonOption,
    LengthScaleOption,
    LimitOption,
    NameOption,
    PlotsOption,
    SpeedOption,
    TargetsOption,
    TraceArgument,
)
from kvrelay.cli.options import CLUSTER, LocalPrefill, LocalPrefillOption, Policy, PolicyOption
from kvrelay.cli.running import RunningClusterOption, RunningEtcdOption, etcd_and_cluster

if TYPE_CHECKING:
    from kvrelay.cli.parsing import Addresses
    from kvrelay.simulator.live_cluster import LiveWorkers

WORKER = "Each worker"


class HardwareName(StrEnum):
    """What is measured."""

    H100 = "h100"
    A100 = "a100"


PrefillOption = Annotated[int, typer.Option("--prefill", min=0, rich_help_panel=CLUSTER, help="Prefill workers.")]
DecodeOption = Annotated[int, typer.Option("--decode", min=0, rich_help_panel=CLUSTER, help="Decode workers.")]
BothOption = Annotated[int, typer.Option("--both", min=0, rich_help_panel=CLUSTER, help="Workers with both roles.")]
CoordinatorsOption = Annotated[
    int,
    typer.Option("--coordinators", min=1, rich_help_panel=CLUSTER, help="Requests go to them in turn."),
]
EnforceOption = Annotated[
    bool,
    typer.Option(
        "--enforce-targets", rich_help_panel=LOAD, help="Reject requests whose targets ttft and itl no plan meets."
    ),
]
SimulationSeedOption = Annotated[
    int, typer.Option("--seed", min=0, rich_help_panel=LOAD, help="The same seed gives the same result.")
]
HardwareOption = Annotated[
    HardwareName | None,
    typer.Option(
        "--hardware",
        rich_help_panel=WORKER,
        help="Eight of these GPUs, as measured with Llama 2 70B. Default: h100.",
    ),
]
TimesOption = Annotated[
    Path | None,
    typer.Option(
        "--times",
        metavar="FILE",
        rich_help_panel=WORKER,
        help="Other times of steps: a CSV of measurements as splitwise-sim has them, or JSON with the fitted step times"
        " of a worker.",
    ),
]
LiveOption = Annotated[
    bool,
    typer.Option(
        "--live",
        rich_help_panel=WORKER,
        help="Workers like those of a running cluster: times of steps and links as these have measured them under"
        " load, sizes as they are.",
    ),
]
BatchedTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-batched-tokens",
        min=1,
        rich_help_panel=WORKER,
        help="Tokens of a step of the engine. Default: 2048, or with --live what the workers have.",
    ),
]
StoreOption = Annotated[
    float | None,
    typer.Option(
        "--store-gib",
        min=0.001,
        rich_help_panel=WORKER,
        help="Host memory for KV blocks, GiB. Default: 1024, or with --live what the workers have.",
    ),
]
LinkOption = Annotated[
    float | None,
    typer.Option(
        "--link-gb-per-s",
        min=0.001,
        rich_help_panel=WORKER,
        help="Network of each worker, GB/s. Default: 25, or with --live what the workers have measured.",
    ),
]


def simulate(
    context: typer.Context,
    trace: TraceArgument,
    prefill: PrefillOption = 8,
    decode: DecodeOption = 16,
    both: BothOption = 0,
    policy: PolicyOption = Policy.COST,
    local_prefill: LocalPrefillOption = LocalPrefill.WHEN_CHEAPER,
    coordinators: CoordinatorsOption = 1,
    hardware: HardwareOption = None,
    times: TimesOption = None,
    live: LiveOption = False,
    etcd: RunningEtcdOption = None,
    cluster: RunningClusterOption = None,
    max_batched_tokens: BatchedTokensOption = None,
    store_gib: StoreOption = None,
    link_gb_per_s: LinkOption = None,
    speed: SpeedOption = 1.0,
    limit: LimitOption = None,
    length_scale: LengthScaleOption = 1.0,
    enforce_targets: EnforceOption = False,
    seed: SimulationSeedOption = 0,
    targets: TargetsOption = DEFAULT_TARGETS,
    json_path: JsonOption = None,
    plots_dir: PlotsOption = None,
    name: NameOption = None,
) -> None:
    """Tell how a cluster of any size would serve a recorded load, within seconds and without the cluster.

    Scheduler and prefix index are those of the coordinator; engines, stores and networks are models under virtual time.
    The same options have the same result.

    Example: kvrelay simulate mooncake_conversation.jsonl --prefill 4 --decode 8 --policy cost --speed 2

    Example: kvrelay simulate azure_conv_2023.csv --prefill 0 --decode 0 --both 12 --hardware a100 --json load.json

    Example: kvrelay simulate azure_conv_2023.csv --prefill 4 --decode 4 --live --etcd 10.0.0.1:2379
    """
    from kvrelay.cli.load_results import check_writable, show, write
    from kvrelay.cli.load_trace import read_requests
    from kvrelay.cli.simulate_run import Arms, run
    from kvrelay.workload.trace import TraceOptions

    load = TraceOptions(limit=limit, speed=speed, length_scale=length_scale)
    if live and (times or hardware):
        fail("--live says what steps take, as --times and --hardware do; give one of them", WRONG_USAGE)
    if not live and (cluster or _is_typed(context, "etcd")):
        fail("--etcd and --cluster name the cluster that --live asks; give --live, too", WRONG_USAGE)
    requests = read_requests(trace, load)
    check_writable(json_path, plots_dir)
    workers = _ask(*etcd_and_cluster(etcd, cluster)) if live else None
    arms = Arms(
        policy=policy.value,
        local_prefill=local_prefill.value,
        num_coordinators=coordinators,
        hardware=(hardware or HardwareName.H100).value,
        times=times,
        num_prefill=prefill,
        num_decode=decode,
        num_both=both,
        max_batched_tokens=max_batched_tokens,
        store_gib=store_gib,
        link_gb_per_s=link_gb_per_s,
        enforce_targets=enforce_targets,
        seed=seed,
    )
    finished = run(requests, arms, targets, workers)
    record, notes = finished.report(name or f"{trace.stem} x{speed:g} {policy}", {"trace": trace.name, **asdict(load)})
    show(record, notes)
    write(record, finished.simulated.outcomes, json_path, plots_dir)
    if not record.summary.num_completed:
        fail("no request was completed", FAILED)


def _is_typed(context: typer.Context, parameter: str) -> bool:
    """Rather than taken from the environment."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _ask(etcd: Addresses, cluster: str) -> LiveWorkers:
    from kvrelay.cli.live_workers import ask

    return ask(etcd, cluster)
