"""What holds for every test process."""

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _compiler_cache() -> Iterator[None]:
    """Importing vLLM makes torch leave a folder for compiled kernels: here it goes with the tests."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-tests-") as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        yield
