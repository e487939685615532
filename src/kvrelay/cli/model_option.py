"""Which files does --model mean, and what do clients call them?"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from kvrelay.cli.failure import WRONG_USAGE, fail
from kvrelay.cli.options import EngineKind


@dataclass(frozen=True, slots=True)
class FoundModel:
    path: str
    """A folder, or a hub's id."""
    served_name: str


def find_model(model: str, served_name: str | None, engine: EngineKind = EngineKind.VLLM) -> FoundModel:
    """Prepare the default model if it is that one; leaves with a message when there is no such model.

    The simulated engine has no files; only the name counts.
    """
    from kvrelay.models import DEFAULT_MODEL, ModelError, default_cache_dir, resolve_model

    if engine is EngineKind.SIMULATED:
        name = os.path.basename(model.rstrip("/")) or DEFAULT_MODEL
        return FoundModel(model or DEFAULT_MODEL, served_name or name)
    try:
        resolved = resolve_model(model, default_cache_dir(dict(os.environ)), _progress)
    except ModelError as error:
        fail(f"{error}; correct --model", WRONG_USAGE)
    return FoundModel(resolved.path, served_name or resolved.served_name)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
