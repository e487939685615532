"""What vLLM is told beyond the given options, and those that are refused before anything is loaded."""

from __future__ import annotations

import pytest
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from kvrelay.engine.vllm import EngineOptionError, VllmEngine, VllmEngineConfig, parse_engine_args
from kvrelay.kv_transfer.segment import Segment, size_for


@pytest.mark.parametrize(
    ("options", "executor"),
    [
        ((), UniProcExecutor),
        (("--tensor-parallel-size", "1"), UniProcExecutor),
        (("--tensor-parallel-size", "2"), None),
        (("--distributed-executor-backend", "mp"), "mp"),
    ],
)
def test_the_only_rank_of_a_cpu_engine_has_no_process_of_its_own(options: tuple[str, ...], executor: object) -> None:
    config = VllmEngineConfig(model="no/such-model", served_model_name="m", options=options)
    assert parse_engine_args(config).distributed_executor_backend == executor


@pytest.mark.parametrize("kind", ["data", "pipeline", "prefill-context", "decode-context"])
async def test_ranks_that_do_not_hold_all_of_their_heads_are_refused(kind: str) -> None:
    options = (f"--{kind}-parallel-size", "2")
    engine = VllmEngine(VllmEngineConfig(model="no/such-model", served_model_name="m", options=options))
    segment = Segment.create(size_for(1, 64))

    with pytest.raises(EngineOptionError, match=f"--{kind}-parallel-size is 1 for a worker"):
        await engine.start(segment, lambda reports: None)

    await engine.close()
    segment.close()
