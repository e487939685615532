"""What `kvrelay up` shows of a process that did not start."""

from __future__ import annotations

from pathlib import Path

from kvrelay.launch.display import log_tail


def test_the_first_error_comes_before_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    echo = "RuntimeError: the engine did not start. See root cause above."
    lines = ["starting", "(EngineCore pid=1) ERROR ValueError: no room for a block; give more", *["info"] * 200, echo]
    log.write_text("\n".join(lines))
    shown = log_tail(log).splitlines()
    assert shown[:3] == ["ValueError: no room for a block; give more", "[...]", "info"]
    assert shown[-1] == echo


def test_an_error_that_is_shown_anyway_is_not_repeated(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("starting\nValueError: no room\n")
    assert log_tail(log) == "starting\nValueError: no room"
    assert log_tail(tmp_path / "missing") == ""
