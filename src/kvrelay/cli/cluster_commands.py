"""The commands that run a coordinator, or a whole cluster on this machine: coordinator, up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvrelay.cli import options as opt
from kvrelay.cli.failure import process_errors
from kvrelay.cli.model_option import find_model
from kvrelay.cli.parsing import check_engine_options
from kvrelay.cli.preflight import check_can_listen, check_disk, check_etcd, check_otlp
from kvrelay.cli.process_id import own_id
from kvrelay.cli.running import running


def coordinator(
    etcd: opt.EtcdOption,
    cluster: opt.ClusterOption = "default",
    coordinator_id: Annotated[
        str | None,
        typer.Option(metavar="ID", rich_help_panel=opt.CLUSTER, help="Default: host name and random characters."),
    ] = None,
    model: opt.ModelOption = "",
    served_model_name: opt.ServedNameOption = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=opt.MODEL, help="Longest prompt plus answer. Default: what workers hold."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH|ID", rich_help_panel=opt.MODEL, help="Default: the model's own.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", rich_help_panel=opt.MODEL, help="Run code that the model brings.")
    ] = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            rich_help_panel=opt.API,
            help="A Jinja template instead of the model's own.",
        ),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=opt.API, help="vLLM's parser of tool calls, for example hermes."),
    ] = None,
    reasoning_parser: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=opt.API, help="vLLM's parser of reasoning.")
    ] = "",
    http: opt.HttpOption = opt.HTTP,
    grpc: opt.GrpcOption = opt.GRPC,
    advertise_host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST", rich_help_panel=opt.NETWORK, help="Where others reach it. Default: the host it listens on."
        ),
    ] = None,
    otlp: opt.OtlpOption = None,
    log_format: opt.LogFormatOption = opt.LogFormat.CONSOLE,
    log_level: opt.LogLevelOption = opt.LogLevel.INFO,
) -> None:
    """Run one coordinator: the OpenAI API, the gRPC API, and the scheduler in front of the workers.

    It needs the model's tokenizer and configuration, not its weights. Any number may run side by side.

    Example: kvrelay coordinator --etcd 10.0.0.1:2379 --http 0.0.0.0:8000 --grpc 0.0.0.0:50051
    """
    check_otlp(otlp)
    check_can_listen("--http", http)
    check_can_listen("--grpc", grpc)
    check_etcd(etcd)
    found = find_model(model, served_model_name)
    template = chat_template.read_text() if chat_template else None
    with process_errors(log_level.value):
        from kvrelay import logs
        from kvrelay.coordinator.config import CoordinatorConfig
        from kvrelay.coordinator.front_end import FrontEndConfig
        from kvrelay.coordinator.http_serving import ServingOptions
        from kvrelay.coordinator.main import run_coordinator

        logs.configure(level=log_level.value, log_format=log_format.value)
        config = CoordinatorConfig(
            coordinator_id=coordinator_id or own_id("coordinator"),
            etcd=[str(address) for address in etcd],
            cluster=cluster,
            http_listen=str(http),
            grpc_listen=str(grpc),
            advertise_host=advertise_host,
            front_end=FrontEndConfig(
                model=found.path,
                served_model_name=found.served_name,
                max_model_len_tokens=max_model_len,
                engine_args={"tokenizer": tokenizer, "trust_remote_code": trust_remote_code},
            ),
            serving=ServingOptions(chat_template=template, tool_parser=tool_parser, reasoning_parser=reasoning_parser),
            otlp_endpoint=otlp,
            log_format=log_format.value,
            log_level=log_level.value,
        )
        exit_code = run_coordinator(config)
    raise typer.Exit(exit_code)


def up(
    engine_args: opt.EngineArgsArgument = None,
    prefill: Annotated[int, typer.Option(min=0, rich_help_panel=opt.CLUSTER, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, rich_help_panel=opt.CLUSTER, help="Decode workers.")] = 1,
    etcd: opt.OptionalEtcdOption = None,
    etcd_binary: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            rich_help_panel=opt.CLUSTER,
            help="The etcd server to start. Default: the one on PATH, or else the one that came with kvrelay.",
        ),
    ] = None,
    cluster: opt.ClusterOption = "default",
    model: opt.ModelOption = "",
    served_model_name: opt.ServedNameOption = None,
    engine: opt.EngineOption = opt.EngineKind.VLLM,
    kv_host_bytes: opt.KvHostBytesOption = opt.KV_HOST_BYTES,
    kv_disk_bytes: opt.KvDiskBytesOption = 0,
    kv_disk_path: opt.KvDiskPathOption = opt.KV_DISK_PATH,
    prefill_args: opt.PrefillArgsOption = None,
    decode_args: opt.DecodeArgsOption = None,
    kv_cache_gib: Annotated[
        int, typer.Option(min=1, rich_help_panel=opt.MODEL, help="Each CPU engine's own KV cache, GiB.")
    ] = 1,
    http: opt.HttpOption = opt.HTTP,
    grpc: opt.GrpcOption = opt.GRPC,
    otlp: opt.OtlpOption = None,
    log_level: opt.LogLevelOption = opt.LogLevel.INFO,
) -> None:
    """Run a whole cluster on this machine until Ctrl-C: etcd, a coordinator, prefill and decode workers.

    Prints where the API listens once everything is ready, and a request to paste. A process that dies is started again.

    Example: kvrelay up --prefill 2 --decode 2 --model ./my-model

    Example: kvrelay up --http 0.0.0.0:8000 -- --dtype float32 --max-model-len 4096

    Example: kvrelay up --prefill-args '--tensor-parallel-size 2' --decode-args '--max-num-seqs 64'
    """
    options = check_engine_options(engine_args)
    check_otlp(otlp)
    if running() is None:  # or else that is the more useful message
        check_can_listen("--http", http)
        check_can_listen("--grpc", grpc)
        check_disk(kv_disk_path, kv_disk_bytes, prefill + decode)
    if etcd is not None:
        check_etcd(etcd)
    found = find_model(model, served_model_name, engine)
    with process_errors(log_level.value):
        from kvrelay.launch.plan import UpConfig
        from kvrelay.launch.state import default_state_dir
        from kvrelay.launch.up import run_up

        config = UpConfig(
            prefill=prefill,
            decode=decode,
            etcd=[str(address) for address in etcd or ()],
            etcd_binary=etcd_binary,
            cluster=cluster,
            model=found.path,
            served_model_name=found.served_name,
            engine=engine.value,
            engine_options=options,
            prefill_options=prefill_args or (),
            decode_options=decode_args or (),
            kv_host_bytes=kv_host_bytes,
            kv_disk_bytes=kv_disk_bytes,
            kv_disk_path=kv_disk_path.absolute(),
            kv_cache_gib=kv_cache_gib,
            http=str(http),
            grpc=str(grpc),
            otlp=otlp,
            log_level=log_level.value,
            state_dir=default_state_dir(os.environ),
            environment=dict(os.environ),
        )
        exit_code = run_up(config)
    raise typer.Exit(exit_code)
