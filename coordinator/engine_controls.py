"""The calls of vLLM's EngineClient that steer one local engine: a cluster has none to steer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, NoReturn

from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(f"{what} is not offered by a kvrelay cluster")


class EngineControls(EngineClient):
    """Answers harmless questions and refuses the rest with NotImplementedError, which becomes HTTP 501."""

    def encode(self, *args: Any, **kwargs: Any) -> AsyncGenerator[PoolingRequestOutput, None]:
        _refuse("pooling")

    async def notify_kv_transfer_request_rejected(self, *args: Any, **kwargs: Any) -> None:
        """Nothing was pinned for a request that never left."""

    async def do_log_stats(self) -> None:
        """The workers log their own."""

    async def start_profile(self, *args: Any, **kwargs: Any) -> None:
        _refuse("profiling")

    async def stop_profile(self) -> None:
        _refuse("profiling")

    async def reset_mm_cache(self) -> None:
        _refuse("resetting the multi-modal cache")

    async def reset_encoder_cache(self) -> None:
        _refuse("resetting the encoder cache")

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        _refuse("resetting the prefix cache")

    async def sleep(self, *args: Any, **kwargs: Any) -> None:
        _refuse("sleeping")

    async def release_kv_cache_memory(self) -> None:
        _refuse("releasing KV cache memory")

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        _refuse("waking up")

    async def is_sleeping(self) -> bool:
        return False

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        _refuse("loading LoRA adapters")

    async def pause_generation(self, *args: Any, **kwargs: Any) -> None:
        _refuse("pausing")

    async def resume_generation(self) -> None:
        _refuse("resuming")

    async def is_paused(self) -> bool:
        return False
