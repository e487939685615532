"""vLLM's front end of the default model; it takes seconds, so there is one of a process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kvrelay.coordinator.front_end import FrontEnd, FrontEndConfig, build_front_end
from tests.support.fake_worker import MODEL

FOLDER = Path.home() / ".cache/kvrelay/models/SmolLM2-135M-Instruct"


@cache
def front_end() -> FrontEnd:
    """Of the model that `make setup` prepares."""
    return build_front_end(FrontEndConfig(model=str(FOLDER), served_model_name=MODEL))
