"""How does a command have twenty options and few parameters? Options that belong together are a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from kvrelay.cli import options as opt
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.transport import KvTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What is served, and under which name."""

    model: opt.ModelOption = ""
    served_model_name: opt.ServedNameOption = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What computes in each worker, where its blocks are kept, and how they go to others."""

    engine: opt.EngineOption = opt.EngineKind.VLLM
    kv_host_bytes: opt.KvHostBytesOption = opt.KV_HOST_BYTES
    kv_disk_bytes: opt.KvDiskBytesOption = 0
    kv_disk_path: opt.KvDiskPathOption = opt.KV_DISK_PATH
    kv_compression: opt.KvCompressionOption = Compression.NONE
    kv_transport: opt.KvTransportOption = KvTransport.AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiOptions:
    """Where clients come in."""

    http: opt.HttpOption = opt.HTTP
    grpc: opt.GrpcOption = opt.GRPC


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveOptions:
    """What one process tells of itself."""

    otlp: opt.OtlpOption = None
    log_format: opt.LogFormatOption = opt.LogFormat.CONSOLE
    log_level: opt.LogLevelOption = opt.LogLevel.INFO


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: with an option for each field of those parameters that are dataclasses.

    A field without a default is an option that must be given. Other parameters stay what they are.
    """
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation) and isinstance(parameter.annotation, type):
            groups[parameter.name] = parameter.annotation
            parameters += _parameters(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**built, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
