"""How does a process log? Structured, for people on a terminal or as JSON for machines."""

from __future__ import annotations

import logging
import sys
from typing import Any

import orjson
import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(*, level: str = "info", log_format: str = "console") -> None:
    """Send this process's logs to stderr, the standard library's among them.

    `level` is a key of `LEVELS`, `log_format` is `console` or `json`; raises `ValueError` for others. vLLM keeps its own
    handlers and its own format.
    """
    if level not in LEVELS or log_format not in ("console", "json"):
        raise ValueError(f"log level {level!r} is one of {', '.join(LEVELS)}, log format {log_format!r} console or json")
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_render(log_format)))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(LEVELS[level])


def _render(log_format: str) -> list[Any]:
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if log_format == "console":
        return [remove, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    to_text = structlog.processors.JSONRenderer(serializer=lambda value, **_: orjson.dumps(value, default=str).decode())
    return [remove, structlog.processors.dict_tracebacks, to_text]
