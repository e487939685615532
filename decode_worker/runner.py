"""What does a decode worker do with a request? Wait for its blocks, load what is stored, generate the rest."""

from __future__ import annotations

from kvrelay.v1 import worker_pb2
from kvrelay.worker.host import Work, WorkerHost
from kvrelay.worker.submission import Sink


class DecodeRole:
    """Runs `Decode` requests on one host."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def decode(self, request: worker_pb2.Decode, sink: Sink) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""
        host = self._host
        host.validate(request.prompt_token_ids, request.sampling)
        prompt = list(request.prompt_token_ids)
        hasher = host.hasher(request.cache_salt, prompt)
        transfer_id = request.prefill_request_id or request.request_id
        try:
            if request.kv_wait_ms:
                await host.receiver.wait_settled(transfer_id, request.kv_wait_ms / 1e3)
            # The engine must compute at least the last token, to sample from it.
            hits = host.store.match(hasher.hashes[: (len(prompt) - 1) // host.block_size])
            host.store.pin(hits)
        finally:
            host.receiver.let_go(transfer_id)
        work = Work(
            request_id=request.request_id,
            prompt_token_ids=prompt,
            sampling=request.sampling,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
        submission = await host.submit(work, hasher, load=hits, sink=sink)
        try:
            await submission.ended.wait()
        finally:
            await host.abort(submission)

    def forget(self, request_id: str) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""
        self._host.receiver.let_go(request_id)
