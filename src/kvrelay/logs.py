"""How does a process log? Structured lines on stderr, for people or for machines, the standard library's included."""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import Processor

LogFormat = Literal["console", "json"]

_QUIET = ("httpx", "httpcore", "asyncio", "hpack", "grpc", "urllib3", "filelock", "huggingface_hub")
"""Loggers that speak of every request; they start at warning."""


def configure(*, level: str = "info", log_format: str = "console", stream: TextIO | None = None) -> None:
    """Send everything that is logged to `stream` (stderr), from `level` on; a later call replaces an earlier one.

    Colours appear on a terminal only. Raises `ValueError` for an unknown level or format.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"there is no log level {level!r}; take debug, info, warning or error")
    if log_format not in ("console", "json"):
        raise ValueError(f"there is no log format {log_format!r}; take console or json")
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    renderers = _renderers(cast("LogFormat", log_format), target)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_common(), processors=[remove, *renderers])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_common(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _common() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _renderers(log_format: LogFormat, stream: TextIO) -> list[Processor]:
    if log_format == "json":
        return [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(default=str)]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
