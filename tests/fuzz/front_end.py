"""vLLM's front end of the default model; it takes seconds, so there is one of a process."""

from __future__ import annotations

from functools import cache

from kvrelay.coordinator.front_end import FrontEnd, FrontEndConfig, build_front_end
from tests.support.default_model import default_model_path
from tests.support.fake_worker import MODEL


@cache
def front_end() -> FrontEnd:
    """Of the default model."""
    return build_front_end(FrontEndConfig(model=default_model_path(), served_model_name=MODEL))
