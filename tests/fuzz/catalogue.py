"""What is there to fuzz, by name?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.fuzz.target import Target
from tests.fuzz.targets import (
    encodings,
    etcd_values,
    events,
    frames,
    generate_calls,
    http_bodies,
    http_connections,
    kv_calls,
    pushes,
    worker_messages,
    worker_sessions,
)

_MODULES = (
    frames,
    encodings,
    pushes,
    kv_calls,
    worker_sessions,
    worker_messages,
    generate_calls,
    http_bodies,
    http_connections,
    etcd_values,
    events,
)
TARGETS: Mapping[str, Target] = {module.TARGET.name: module.TARGET for module in _MODULES}

CORPUS = Path(__file__).parent / "corpus"
"""A folder for each target, of inputs that reach something which no smaller one does."""


def kept_inputs(name: str) -> list[Path]:
    """Of one target, in a fixed order."""
    return sorted((CORPUS / name).glob("*"))
