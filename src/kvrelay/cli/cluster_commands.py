"""The commands that run a coordinator, or a whole cluster on this machine: coordinator, up."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrelay.cli import options as opt
from kvrelay.cli.admission_options import AdmissionOptions
from kvrelay.cli.connection_options import ConnectionOptions
from kvrelay.cli.detection_options import DetectionOptions, HeartbeatOptions
from kvrelay.cli.failure import process_errors
from kvrelay.cli.model_option import FoundModel, find_model
from kvrelay.cli.option_groups import ApiOptions, EngineOptions, ModelOptions, ObserveOptions, grouped
from kvrelay.cli.parsing import check_engine_options
from kvrelay.cli.preflight import check_can_listen, check_disk, check_etcd, check_otlp
from kvrelay.cli.process_id import own_id
from kvrelay.cli.replanning_options import ReplanningOptions
from kvrelay.cli.running import running

if TYPE_CHECKING:
    from kvrelay.coordinator.front_end import FrontEndConfig
    from kvrelay.coordinator.http_serving import ServingOptions
    from kvrelay.launch.plan import UpConfig

_REPLICA_FLAG = "--one-of-replicas"
"""Tells a process that it is one of those that `--replicas` asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorOptions:
    """Which coordinator of which cluster it is."""

    etcd: opt.EtcdOption
    cluster: opt.ClusterOption = "default"
    coordinator_id: Annotated[
        str | None,
        typer.Option(metavar="ID", rich_help_panel=opt.CLUSTER, help="Default: host name and random characters."),
    ] = None
    replicas: opt.ReplicasOption = 1
    policy: opt.PolicyOption = opt.Policy.COST
    local_prefill: opt.LocalPrefillOption = opt.LocalPrefill.WHEN_CHEAPER
    is_replica: Annotated[bool, typer.Option(_REPLICA_FLAG, hidden=True)] = False
    advertise_host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST", rich_help_panel=opt.NETWORK, help="Where others reach it. Default: the host it listens on."
        ),
    ] = None
    etcd_history_s: Annotated[
        float,
        typer.Option(
            "--etcd-history",
            min=0.0,
            metavar="SECONDS",
            rich_help_panel=opt.CLUSTER,
            help="One coordinator of the cluster has etcd forget what is older. 0: nobody does.",
        ),
    ] = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEndOptions:
    """What lies between text and tokens."""

    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=opt.MODEL, help="Longest prompt plus answer. Default: what workers hold."),
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH|ID", rich_help_panel=opt.MODEL, help="Default: the model's own.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", rich_help_panel=opt.MODEL, help="Run code that the model brings.")
    ] = False
    chat_template: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            rich_help_panel=opt.API,
            help="A Jinja template instead of the model's own.",
        ),
    ] = None
    tool_parser: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=opt.API, help="vLLM's parser of tool calls, for example hermes."),
    ] = None
    reasoning_parser: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=opt.API, help="vLLM's parser of reasoning.")
    ] = ""


@grouped
def coordinator(
    member: CoordinatorOptions,
    model: ModelOptions,
    front_end: FrontEndOptions,
    api: ApiOptions,
    admission: AdmissionOptions,
    observe: ObserveOptions,
    detection: HeartbeatOptions,
    replanning: ReplanningOptions,
    connections: ConnectionOptions,
) -> None:
    """Run one coordinator: the OpenAI API, the gRPC API, and the scheduler in front of the workers.

    It needs the model's tokenizer and configuration, not its weights. Any number may run side by side; one machine's
    can share ports: connections are spread over the --replicas, and one that dies is started again.

    Example: kvrelay coordinator --etcd 10.0.0.1:2379 --http 0.0.0.0:8000 --grpc 0.0.0.0:50051 --replicas 4
    """
    # A coordinator takes small messages at a high rate: without gRPC's event engine each costs a quarter less CPU time.
    # gRPC reads this when it is imported.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener,-event_engine_callback_cq")
    # Prompts are tokenized one at a time: threads for that cost more than they do.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    check_otlp(observe.otlp)
    if not member.is_replica:  # whose ports are held for it
        check_can_listen("--http", api.http)
        check_can_listen("--grpc", api.grpc)
    check_etcd(member.etcd)
    found = find_model(model.model, model.served_model_name)
    coordinator_id = member.coordinator_id or own_id("coordinator")
    with process_errors(observe.log_level.value):
        from kvrelay import logs

        logs.configure(level=observe.log_level.value, log_format=observe.log_format.value)
        if member.replicas > 1 and not member.is_replica:
            raise typer.Exit(_run_replicas(coordinator_id, member, api))
        from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
        from kvrelay.coordinator.config import CoordinatorConfig
        from kvrelay.coordinator.main import run_coordinator
        from kvrelay.coordinator.scheduler.cost_config import CostConfig

        config = CoordinatorConfig(
            coordinator_id=coordinator_id,
            etcd=[str(address) for address in member.etcd],
            cluster=member.cluster,
            http_listen=str(api.http),
            grpc_listen=str(api.grpc),
            shares_ports=member.is_replica,
            advertise_host=member.advertise_host,
            etcd_history_s=member.etcd_history_s or None,
            policy=member.policy.value,
            cost=CostConfig(local_prefill=member.local_prefill.value),
            front_end=_front_end(front_end, found),
            serving=_serving(front_end),
            engine=ClusterEngineConfig(
                admission=admission.config(),
                max_plans=replanning.max_plans,
                wait_for_workers_s=replanning.wait_for_workers_s,
            ),
            heartbeat=detection.heartbeat(),
            connections=connections.limits(),
            otlp_endpoint=observe.otlp,
            log_format=observe.log_format.value,
            log_level=observe.log_level.value,
        )
        exit_code = run_coordinator(config)
    raise typer.Exit(exit_code)


def _run_replicas(coordinator_id: str, member: CoordinatorOptions, api: ApiOptions) -> int:
    from kvrelay.launch.replicas import ReplicasConfig, run_replicas

    return run_replicas(
        ReplicasConfig(
            coordinator_id=coordinator_id,
            num_replicas=member.replicas,
            etcd=[str(address) for address in member.etcd],
            cluster=member.cluster,
            http_listen=str(api.http),
            grpc_listen=str(api.grpc),
            arguments=[*sys.argv[1:], _REPLICA_FLAG],
            environment=dict(os.environ),
        )
    )


def _front_end(options: FrontEndOptions, found: FoundModel) -> FrontEndConfig:
    from kvrelay.coordinator.front_end import FrontEndConfig

    return FrontEndConfig(
        model=found.path,
        served_model_name=found.served_name,
        max_model_len_tokens=options.max_model_len,
        engine_args={"tokenizer": options.tokenizer, "trust_remote_code": options.trust_remote_code},
    )


def _serving(options: FrontEndOptions) -> ServingOptions:
    from kvrelay.coordinator.http_serving import ServingOptions

    return ServingOptions(
        chat_template=options.chat_template.read_text() if options.chat_template else None,
        tool_parser=options.tool_parser,
        reasoning_parser=options.reasoning_parser,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What a whole cluster consists of."""

    prefill: Annotated[int, typer.Option(min=0, rich_help_panel=opt.CLUSTER, help="Prefill workers.")] = 1
    decode: Annotated[int, typer.Option(min=1, rich_help_panel=opt.CLUSTER, help="Decode workers.")] = 1
    replicas: opt.ReplicasOption = 1
    policy: opt.PolicyOption = opt.Policy.COST
    local_prefill: opt.LocalPrefillOption = opt.LocalPrefill.WHEN_CHEAPER
    etcd: opt.OptionalEtcdOption = None
    etcd_binary: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            rich_help_panel=opt.CLUSTER,
            help="The etcd server to start. Default: the one on PATH, or else the one that came with kvrelay.",
        ),
    ] = None
    cluster: opt.ClusterOption = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildrenOptions:
    """What the children are told."""

    prefill_args: opt.PrefillArgsOption = None
    decode_args: opt.DecodeArgsOption = None
    coordinator_args: opt.CoordinatorArgsOption = None
    kv_cache_gib: Annotated[
        int, typer.Option(min=1, rich_help_panel=opt.MODEL, help="Each CPU engine's own KV cache, GiB.")
    ] = 1
    otlp: opt.OtlpOption = None
    log_level: opt.LogLevelOption = opt.LogLevel.INFO


@grouped
def up(
    cluster: ClusterOptions,
    model: ModelOptions,
    engine: EngineOptions,
    api: ApiOptions,
    admission: AdmissionOptions,
    children: ChildrenOptions,
    detection: DetectionOptions,
    engine_args: opt.EngineArgsArgument = None,
) -> None:
    """Run a whole cluster on this machine until Ctrl-C: etcd, a coordinator, prefill and decode workers.

    Prints where the API listens once everything is ready, and a request to paste. A process that dies is started again.

    Example: kvrelay up --prefill 2 --decode 2 --model ./my-model

    Example: kvrelay up --http 0.0.0.0:8000 -- --dtype float32 --max-model-len 4096

    Example: kvrelay up --prefill-args '--tensor-parallel-size 2' --decode-args '--max-num-seqs 64'
    """
    options = check_engine_options(engine_args)
    check_otlp(children.otlp)
    if running() is None:  # or else that is the more useful message
        check_can_listen("--http", api.http)
        check_can_listen("--grpc", api.grpc)
        check_disk(engine.kv_disk_path, engine.kv_disk_bytes, cluster.prefill + cluster.decode)
    if cluster.etcd is not None:
        check_etcd(cluster.etcd)
    found = find_model(model.model, model.served_model_name, engine.engine)
    with process_errors(children.log_level.value):
        from kvrelay.launch.up import run_up

        exit_code = run_up(_up_config(cluster, found, engine, api, admission, children, detection, options))
    raise typer.Exit(exit_code)


def _up_config(
    cluster: ClusterOptions,
    found: FoundModel,
    engine: EngineOptions,
    api: ApiOptions,
    admission: AdmissionOptions,
    children: ChildrenOptions,
    detection: DetectionOptions,
    engine_options: tuple[str, ...],
) -> UpConfig:
    from kvrelay.launch.plan import UpConfig
    from kvrelay.launch.state import default_state_dir

    return UpConfig(
        prefill=cluster.prefill,
        decode=cluster.decode,
        replicas=cluster.replicas,
        etcd=[str(address) for address in cluster.etcd or ()],
        etcd_binary=cluster.etcd_binary,
        cluster=cluster.cluster,
        model=found.path,
        served_model_name=found.served_name,
        engine=engine.engine.value,
        engine_options=engine_options,
        prefill_options=children.prefill_args or (),
        decode_options=children.decode_args or (),
        coordinator_options=(
            *("--policy", cluster.policy.value, "--local-prefill", cluster.local_prefill.value),
            *admission.arguments(),
            *detection.heartbeat_arguments(),
            *(children.coordinator_args or ()),
        ),
        worker_options=detection.arguments(),
        kv_host_bytes=engine.kv_host_bytes,
        kv_disk_bytes=engine.kv_disk_bytes,
        kv_compression=engine.kv_compression,
        kv_disk_path=engine.kv_disk_path.absolute(),
        kv_transport=engine.kv_transport,
        kv_cache_gib=children.kv_cache_gib,
        http=str(api.http),
        grpc=str(api.grpc),
        otlp=children.otlp,
        log_level=children.log_level.value,
        state_dir=default_state_dir(os.environ),
        environment=dict(os.environ),
    )
