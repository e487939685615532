"""Engine options that cannot work are refused before anything is loaded."""

from __future__ import annotations

import pytest

from kvrelay.engine.vllm import EngineOptionError, VllmEngine, VllmEngineConfig
from kvrelay.kv_transfer.segment import Segment, size_for


@pytest.mark.parametrize("kind", ["data", "pipeline", "prefill-context", "decode-context"])
async def test_ranks_that_do_not_hold_all_of_their_heads_are_refused(kind: str) -> None:
    options = (f"--{kind}-parallel-size", "2")
    engine = VllmEngine(VllmEngineConfig(model="no/such-model", served_model_name="m", options=options))
    segment = Segment.create(size_for(1, 64))

    with pytest.raises(EngineOptionError, match=f"--{kind}-parallel-size is 1 for a worker"):
        await engine.start(segment, lambda reports: None)

    await engine.close()
    segment.close()
