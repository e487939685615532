"""Every logger ends up in one stream, in one format."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from kvrelay import logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def _lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_kinds_of_loggers_give_the_same_json() -> None:
    stream = io.StringIO()
    logs.configure(log_format="json", stream=stream)
    structlog.get_logger("a").info("joined", worker_id="w", slots=3)
    logging.getLogger("b").warning("lost %s", "w", extra={"slots": 3})
    first, second = _lines(stream)
    assert (first["event"], first["level"], first["logger"], first["worker_id"]) == ("joined", "info", "a", "w")
    assert (second["event"], second["level"], second["logger"], second["slots"]) == ("lost w", "warning", "b", 3)
    assert str(first["timestamp"]).endswith("Z")


def test_the_level_holds_for_both() -> None:
    stream = io.StringIO()
    logs.configure(level="warning", log_format="json", stream=stream)
    structlog.get_logger("a").info("no")
    logging.getLogger("b").info("no")
    assert _lines(stream) == []


def test_talkative_libraries_start_at_warning() -> None:
    stream = io.StringIO()
    logs.configure(log_format="json", stream=stream)
    logging.getLogger("httpx").info("GET")
    assert _lines(stream) == []


def test_exceptions_stay_on_one_json_line() -> None:
    stream = io.StringIO()
    logs.configure(log_format="json", stream=stream)
    try:
        raise KeyError("k")
    except KeyError:
        logging.getLogger("b").exception("failed")
    (line,) = _lines(stream)
    assert "KeyError" in json.dumps(line["exception"])


def test_the_console_has_no_colours_without_a_terminal() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    structlog.get_logger("a").info("joined", worker_id="w")
    assert "joined" in stream.getvalue()
    assert "worker_id=w" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("wrong", [{"level": "loud"}, {"log_format": "xml"}])
def test_wrong_values_are_named(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"loud|xml"):
        logs.configure(**wrong)
