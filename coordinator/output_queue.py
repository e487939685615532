"""How do outputs wait for the caller of `ClusterEngine.generate`, and how does a failure reach it?"""

from __future__ import annotations

from typing import cast

from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine.output_processor import RequestOutputCollector


class OutputQueue(RequestOutputCollector):
    """vLLM's, where a failure comes after what was generated before it instead of in its place."""

    _failure: Exception | None = None

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Take an output, or the failure that nothing follows."""
        if isinstance(output, Exception) and self.output is not None:
            self._failure = output
        else:
            super().put(output)

    async def next(self) -> RequestOutput:
        """Everything that has come since the last call; waits for it. Raises the failure once all else is read."""
        output = self.get_nowait()
        if output is None:
            if self._failure is not None:
                raise self._failure
            output = await self.get()
        return cast("RequestOutput", output)
