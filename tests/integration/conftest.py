"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay.coordinator.front_end import FrontEnd, FrontEndConfig, build_front_end
from tests.support.default_model import default_model_path
from tests.support.fake_worker import MODEL


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return Path(default_model_path())


@pytest.fixture(scope="session")
def front_end(model_folder: Path) -> Iterator[FrontEnd]:
    """vLLM's front end of the default model; it takes seconds, so tests share it."""
    front_end = build_front_end(FrontEndConfig(model=str(model_folder), served_model_name=MODEL))
    yield front_end
    front_end.close()
