"""One target in this process: `python -m tests.fuzz.one_target NAME SECONDS FOLDER`.

Inputs that reach something new come into FOLDER/found. libFuzzer ends the process itself: with 0, or with the input
that broke something in FOLDER/crashes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvrelay"], enable_loader_override=False):
    from tests.fuzz.catalogue import TARGETS, kept_inputs

_MOST_BYTES = 4096
_MOST_MB = 3072
"""Resident; vLLM's front end takes a quarter of it."""
_HANG_S = 25


def main(name: str, seconds: int, folder: Path) -> None:
    """Does not return."""
    target = TARGETS[name]
    found, crashes, words = folder / "found", folder / "crashes", folder / "words"
    found.mkdir()
    crashes.mkdir()
    _begin_with(found, [*target.seeds(), *(kept.read_bytes() for kept in kept_inputs(name))])
    options = [f"-max_total_time={seconds}", f"-max_len={_MOST_BYTES}", f"-rss_limit_mb={_MOST_MB}"]
    options += [f"-timeout={_HANG_S}", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
    if target.words:
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        options.append(f"-dict={words}")
    with target.open() as check:
        atheris.Setup([sys.argv[0], *options, str(found)], check)
        atheris.Fuzz()


def _begin_with(found: Path, inputs: Sequence[bytes]) -> None:
    for number, each in enumerate(inputs):
        (found / f"given-{number}").write_bytes(each)


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
