"""What does a decode worker do with a request? Wait for its blocks, load what is stored, generate the rest."""

from __future__ import annotations

from contextlib import AbstractContextManager

from kvrelay.errors import InvalidRequestError
from kvrelay.kv_transfer.transfer import Transfer
from kvrelay.v1 import worker_pb2
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.prefix_source import source_of
from kvrelay.worker.submission import Handlers, Sink, Submission
from kvrelay.worker.work import Work


class DecodeRole:
    """Runs `Decode` requests on one host."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def decode(self, request: worker_pb2.Decode, sink: Sink) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""
        with self._host.job("decode"):
            submission = await self._submit(request, sink)
            try:
                await submission.ended.wait()
            finally:
                self._host.abort(submission)

    async def _submit(self, request: worker_pb2.Decode, sink: Sink) -> Submission:
        host = self._host
        transfer_id = request.prefill_request_id or request.request_id
        work = Work.of(request, "decode")
        try:
            host.validate(request.prompt_token_ids, request.sampling)
            if request.num_generated_tokens >= len(request.prompt_token_ids):
                num_tokens, num_all = request.num_generated_tokens, len(request.prompt_token_ids)
                raise InvalidRequestError(
                    f"num_generated_tokens is {num_tokens}, of a prompt of {num_all}; some of it comes before",
                    field="num_generated_tokens",
                )
            transfer = await self._wait_for_blocks(transfer_id, request)
            work.mark("kv_ready")
            hasher, stored = await host.look_up(request.cache_salt, request.prompt_token_ids, source_of(request))
        finally:
            host.receiver.let_go(transfer_id)
        work.note_restored(stored.restored_tokens)
        counters = work.timeline.counters
        counters["decode.tokens_stored"] = stored.load_tokens
        if transfer is not None and transfer.received_bytes:
            counters["kv.received_bytes"] = transfer.received_bytes
            work.timeline.events.add(name="kv.last_frame", unix_ns=transfer.last_frame_unix_ns)
        return await host.submit(work, hasher, stored, save_partial=False, handlers=Handlers(sink=sink))

    async def _wait_for_blocks(self, transfer_id: str, request: worker_pb2.Decode) -> Transfer | None:
        if not request.kv_wait_ms:
            return None
        with self._host.tracing.start_span("kv.wait", request.trace) as span:
            transfer = await self._host.receiver.wait_settled(transfer_id, request.kv_wait_ms / 1e3)
            if transfer is None:
                span.fail("no blocks are coming")
            else:
                span.set({"kv.blocks": transfer.received_blocks, "kv.bytes": transfer.received_bytes})
        return transfer

    def forget(self, request_id: str) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""
        self._host.receiver.let_go(request_id)

    def session(self, coordinator_id: str) -> AbstractContextManager[None]:
        """See `kvrelay.worker.role.DecodeRunner`."""
        return self._host.receiver.owners.session(coordinator_id)

    def end_wait(self, request_id: str) -> None:
        """See `kvrelay.worker.role.DecodeRunner`."""
        self._host.receiver.end(request_id)
