"""Which model is it, whatever it is called and wherever it lies?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

_SAMPLE_BYTES = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


class ModelConfiguration(Protocol):
    """What is needed of transformers' `PretrainedConfig`."""

    def to_dict(self) -> dict[str, object]:
        """Everything that config.json and overrides have set."""


def model_identity(model: str, configuration: ModelConfiguration) -> str:
    """A short digest; equal for copies of one model on two machines, different for two fine-tunes of one architecture.

    Covers the effective configuration, and the weights: those in a local folder by name, size, beginning and end of
    each file (reading them whole would take minutes), those of a hub by the commit.
    """
    values = configuration.to_dict()
    commit = values.pop("_commit_hash", None) or getattr(configuration, "_commit_hash", None)
    for name in _NOT_THE_MODEL:
        values.pop(name, None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    folder = Path(model)
    if not folder.is_dir():
        digest.update(f"{model}@{commit}".encode())
        return digest.hexdigest()[:16]
    for file in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as weights:
            digest.update(weights.read(_SAMPLE_BYTES))
            weights.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
