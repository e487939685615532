"""The options that several process commands share, each described once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvrelay import default_addresses
from kvrelay.cli.parsing import (
    Address,
    Addresses,
    EngineArgs,
    parse_address,
    parse_addresses,
    parse_engine_args,
    parse_size,
    parse_store_size,
    parse_weight,
)
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.transport import KvTransport


class EngineKind(StrEnum):
    """What computes."""

    VLLM = "vllm"
    SIMULATED = "simulated"


class LogFormat(StrEnum):
    """For people, or for machines."""

    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    """From the most to the least talkative."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Policy(StrEnum):
    """How the coordinator chooses the workers of a request: names of the scheduler's policies."""

    COST = "cost"
    LEAST_LOADED = "least-loaded"
    ROUND_ROBIN = "round-robin"
    WEIGHTED = "weighted"
    RANDOM = "random"
    PREFIX_ONLY = "prefix-only"


class LocalPrefill(StrEnum):
    """Whether decode workers compute prompts."""

    WHEN_CHEAPER = "when-cheaper"
    NEVER = "never"
    ALWAYS = "always"


HTTP = parse_address(default_addresses.HTTP)
GRPC = parse_address(default_addresses.GRPC)
KV_HOST_BYTES = 2 << 30
KV_DISK_PATH = Path("/var/tmp")  # noqa: S108 - the file there has no name

CLUSTER = "The cluster"
MODEL = "The model"
API = "The API"
NETWORK = "The network"
OBSERVE = "Seeing it"

EtcdOption = Annotated[
    Addresses,
    typer.Option(
        "--etcd",
        parser=parse_addresses,
        metavar="HOST:PORT[,HOST:PORT]",
        envvar="KVRELAY_ETCD",
        rich_help_panel=CLUSTER,
        help="The cluster's etcd, all members with commas between them.",
    ),
]
OptionalEtcdOption = Annotated[
    Addresses | None,
    typer.Option(
        "--etcd",
        parser=parse_addresses,
        metavar="HOST:PORT[,HOST:PORT]",
        envvar="KVRELAY_ETCD",
        rich_help_panel=CLUSTER,
        help="Use this etcd instead of starting one.",
    ),
]
ClusterOption = Annotated[
    str, typer.Option("--cluster", rich_help_panel=CLUSTER, help="Clusters of different names share an etcd unseen.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="PATH|ID",
        rich_help_panel=MODEL,
        help="A folder in Hugging Face format or a hub id. Default: SmolLM2-135M-Instruct, prepared on first use.",
    ),
]
ServedNameOption = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        rich_help_panel=MODEL,
        help="What clients call the model. Default: the folder's name or the hub id.",
    ),
]
EngineOption = Annotated[
    EngineKind,
    typer.Option("--engine", rich_help_panel=MODEL, help="simulated computes nothing: for tests of the rest."),
]
KvHostBytesOption = Annotated[
    int,
    typer.Option(
        "--kv-host-bytes",
        parser=parse_store_size,
        metavar="SIZE",
        show_default="2GiB",
        rich_help_panel=MODEL,
        help="Host memory for KV blocks, of each worker.",
    ),
]
KvCompressionOption = Annotated[
    Compression,
    typer.Option(
        "--kv-compression",
        rich_help_panel=MODEL,
        help="Of KV blocks sent over gRPC; on one machine and through process groups they go as they are. none,"
        " lossless, auto (lossless where the link is slower than that), or fp8, which changes what the model"
        " computes and must be given to all workers.",
    ),
]
KvDiskBytesOption = Annotated[
    int,
    typer.Option(
        "--kv-disk-bytes",
        parser=parse_size,
        metavar="SIZE",
        show_default="0, none",
        rich_help_panel=MODEL,
        help="Room on disk for KV blocks that leave host memory, of each worker.",
    ),
]
KvDiskPathOption = Annotated[
    Path,
    typer.Option(
        "--kv-disk-path",
        metavar="DIR",
        rich_help_panel=MODEL,
        help="Where that room is taken; best a local SSD. No file is left.",
    ),
]
KvTransportOption = Annotated[
    KvTransport,
    typer.Option(
        "--kv-transport",
        rich_help_panel=NETWORK,
        help="How KV blocks go to other workers and come from them. auto: shared memory on one machine, else gRPC."
        " collective: NCCL where both have GPUs, else gloo. A pair uses what both allow, and gRPC when that fails."
        " NCCL and gloo connect to free ports without a password.",
    ),
]
EngineArgsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- ENGINE OPTIONS", help="Options of vLLM's engine, as `vllm serve` has them."),
]
PrefillArgsOption = Annotated[
    EngineArgs | None,
    typer.Option(
        "--prefill-args",
        parser=parse_engine_args,
        metavar="'ENGINE OPTIONS'",
        rich_help_panel=MODEL,
        help="More engine options, in one string, for prefill workers only.",
    ),
]
CoordinatorArgsOption = Annotated[
    EngineArgs | None,
    typer.Option(
        "--coordinator-args",
        parser=parse_engine_args,
        metavar="'OPTIONS'",
        rich_help_panel=API,
        help="More options of `kvrelay coordinator`, in one string, like '--stall-timeout 20'.",
    ),
]
DecodeArgsOption = Annotated[
    EngineArgs | None,
    typer.Option(
        "--decode-args",
        parser=parse_engine_args,
        metavar="'ENGINE OPTIONS'",
        rich_help_panel=MODEL,
        help="More engine options, in one string, for decode workers only.",
    ),
]
ListenOption = Annotated[
    Address,
    typer.Option(
        "--listen", parser=parse_address, metavar="HOST:PORT", rich_help_panel=NETWORK, help="Port 0 takes a free one."
    ),
]
KvListenOption = Annotated[
    Address | None,
    typer.Option(
        "--kv-listen",
        parser=parse_address,
        metavar="HOST:PORT",
        rich_help_panel=NETWORK,
        help="Where KV blocks come in. Default: the host of --listen, a free port; name one to open a firewall for it.",
    ),
]
KvAdvertiseOption = Annotated[
    Address | None,
    typer.Option(
        "--kv-advertise",
        parser=parse_address,
        metavar="HOST:PORT",
        rich_help_panel=NETWORK,
        help="Where the others send KV blocks. Default: the host of --advertise, the port of --kv-listen.",
    ),
]
AdvertiseOption = Annotated[
    Address | None,
    typer.Option(
        "--advertise",
        parser=parse_address,
        metavar="HOST:PORT",
        rich_help_panel=NETWORK,
        help="Where the others reach this worker. Default: --listen, which must then name a host.",
    ),
]
WorkerIdOption = Annotated[
    str | None,
    typer.Option(
        "--worker-id", metavar="ID", rich_help_panel=CLUSTER, help="Default: role, host name and random characters."
    ),
]
WeightOption = Annotated[
    float,
    typer.Option(
        "--weight",
        parser=parse_weight,
        metavar="NUMBER",
        rich_help_panel=CLUSTER,
        help="Its share of the requests under --policy weighted, relative to other workers.",
    ),
]
HttpOption = Annotated[
    Address,
    typer.Option(
        "--http",
        parser=parse_address,
        metavar="HOST:PORT",
        rich_help_panel=NETWORK,
        help="Where the OpenAI API listens.",
    ),
]
GrpcOption = Annotated[
    Address,
    typer.Option(
        "--grpc", parser=parse_address, metavar="HOST:PORT", rich_help_panel=NETWORK, help="Where the gRPC API listens."
    ),
]
ReplicasOption = Annotated[
    int,
    typer.Option(
        "--replicas",
        min=1,
        metavar="N",
        rich_help_panel=CLUSTER,
        help="Coordinator processes that share the two ports.",
    ),
]
PolicyOption = Annotated[
    Policy, typer.Option("--policy", rich_help_panel=CLUSTER, help="How the workers of a request are chosen.")
]
LocalPrefillOption = Annotated[
    LocalPrefill,
    typer.Option(
        "--local-prefill",
        rich_help_panel=CLUSTER,
        help="Whether decode workers compute prompts, under the policy cost; never: only where nobody else can.",
    ),
]
OtlpOption = Annotated[
    str | None,
    typer.Option(
        "--otlp",
        metavar="URL",
        envvar="KVRELAY_OTLP",
        rich_help_panel=OBSERVE,
        help="Send traces to this OTLP gRPC receiver, for example http://localhost:4317. Default: no tracing.",
    ),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option("--log-format", envvar="KVRELAY_LOG_FORMAT", rich_help_panel=OBSERVE, help="How log lines look."),
]
LogLevelOption = Annotated[
    LogLevel,
    typer.Option("--log-level", envvar="KVRELAY_LOG_LEVEL", rich_help_panel=OBSERVE, help="The least that is logged."),
]
