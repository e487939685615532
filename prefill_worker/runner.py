"""What does a prefill worker do with a request? Compute what its store lacks, and push it all while computing."""

from __future__ import annotations

import asyncio

import structlog

from kvrelay.kv_transfer.peer import Peer
from kvrelay.kv_transfer.sender import Push
from kvrelay.v1 import kv_transfer_pb2, worker_pb2
from kvrelay.worker.host import Work, WorkerHost
from kvrelay.worker.submission import Sink, Submission

_log = structlog.get_logger(__name__)


class PrefillRole:
    """Runs `Prefill` requests on one host."""

    def __init__(self, host: WorkerHost, worker_id: str) -> None:
        self._host = host
        self._worker_id = worker_id

    async def prefill(self, request: worker_pb2.Prefill, sink: Sink) -> None:
        """See `kvrelay.worker.role.PrefillRunner`."""
        host = self._host
        host.validate(request.prompt_token_ids, request.sampling)
        prompt = list(request.prompt_token_ids)
        hasher = host.hasher(request.cache_salt, prompt)
        # The engine must compute at least the last token, to sample from it.
        hits = host.store.match(hasher.hashes[: (len(prompt) - 1) // host.block_size])
        host.store.pin(hits)
        push = self._push(request, hasher.hashes)
        missing = len(hasher.hashes) - len(hits)

        def on_block(block: int, slot: int) -> None:
            nonlocal missing
            push.add(block, slot)
            missing -= 1
            if not missing:
                push.finish()

        host.store.pin(hits)
        for block, slot in enumerate(hits):
            push.add(block, slot)
        if not missing:
            push.finish()
        async with asyncio.TaskGroup() as tasks:
            pushing = tasks.create_task(self._run_push(push, request.request_id))
            work = Work(
                request_id=request.request_id,
                prompt_token_ids=prompt,
                sampling=request.sampling,
                cache_salt=request.cache_salt,
                priority=request.priority,
            )
            submission = await host.submit(work, hasher, load=hits, sink=sink, on_block=on_block)
            await self._until_closed(submission)
            push.finish()  # Blocks that the store had no room for do not come.
            await pushing

    async def _until_closed(self, submission: Submission) -> None:
        try:
            await submission.ended.wait()
        finally:
            await self._host.abort(submission)
        await submission.closed.wait()

    def _push(self, request: worker_pb2.Prefill, hashes: list[bytes]) -> Push:
        host = self._host
        offer = kv_transfer_pb2.OfferRequest(
            request_id=request.request_id,
            sender_id=self._worker_id,
            layout=host.info.layout,
            block_hashes=b"".join(hashes),
            trace=request.trace,
        )
        peer: Peer = host.peers.get(request.decode_address)
        return Push(peer, host.segment, offer, host.store.unpin)

    async def _run_push(self, push: Push, request_id: str) -> None:
        result = await push.run()
        self._host.counters["blocks_pushed"] += result.num_blocks
        self._host.counters["bytes_pushed"] += result.num_bytes
        if result.error:
            _log.warning("push incomplete", request_id=request_id, error=result.error)
