"""What does a prefill worker do with a request? Compute what its store lacks, and push it all while computing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import structlog

from kvrelay.block_hash import BlockHasher
from kvrelay.errors import KvrelayError, NoWorkersError
from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.peer import LayoutRefusedError
from kvrelay.kv_transfer.sender import Push
from kvrelay.tracing import Span
from kvrelay.v1 import kv_transfer_pb2, worker_pb2
from kvrelay.worker.host import WorkerHost
from kvrelay.worker.prefix_source import source_of
from kvrelay.worker.stored_prompt import StoredPrompt
from kvrelay.worker.submission import Handlers, Sink, Submission
from kvrelay.worker.work import Work

_log = structlog.get_logger(__name__)


class PrefillRole:
    """Runs `Prefill` requests on one host."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def prefill(self, request: worker_pb2.Prefill, sink: Sink) -> None:
        """See `kvrelay.worker.role.PrefillRunner`."""
        host = self._host
        host.validate(request.prompt_token_ids, request.sampling)
        work = Work.of(request, "prefill")
        with host.job("prefill"):
            hasher, stored = await host.look_up(request.cache_salt, request.prompt_token_ids, source_of(request))
            work.note_restored(stored.restored_tokens)
            await self._run(request, work, hasher, stored, sink)

    async def _run(
        self, request: worker_pb2.Prefill, work: Work, hasher: BlockHasher, stored: StoredPrompt, sink: Sink
    ) -> None:
        """Nothing may be awaited before the engine has the request: its pins pass over with it."""
        host = self._host
        with host.tracing.start_span("kv.push", request.trace) as span, _first_failure():
            outgoing = _Outgoing(self._push(request, stored.hashes, span), stored, host.info.layout.num_layers, sink)
            try:
                host.store.pin(stored.present)
                outgoing.add_present()
                submission = await host.submit(work, hasher, stored, save_partial=True, handlers=outgoing.handlers)
                async with asyncio.TaskGroup() as tasks:
                    pushing = tasks.create_task(self._run_push(outgoing.push, request.decode_address, submission, span))
                    await self._until_closed(submission)
                    outgoing.push.finish()  # Blocks that the store had no room for do not come.
                    await pushing
            finally:
                outgoing.push.close()

    async def _until_closed(self, submission: Submission) -> None:
        try:
            await submission.ended.wait()
        finally:
            self._host.abort(submission)
        await submission.closed.wait()

    def _push(self, request: worker_pb2.Prefill, hashes: Sequence[bytes], span: Span) -> Push:
        host = self._host
        offer = kv_transfer_pb2.OfferRequest(
            request_id=request.request_id,
            layout=host.info.layout,
            block_hashes=b"".join(hashes),
            trace=span.context,
            local=host.local_segment,
            coordinator_id=request.coordinator_id,
        )
        return Push(partial(host.peers.get, request.decode_address), host.segment, offer, host.store)

    async def _run_push(self, push: Push, decode_address: str, submission: Submission, span: Span) -> None:
        """Blocks of a prompt that waits for the engine take no room of the decode worker's store yet."""
        await submission.started.wait()
        try:
            result = await push.run()
        except LayoutRefusedError as error:
            # Every request between these two would be computed twice: say so.
            raise NoWorkersError(str(error)) from error
        if not result.error:
            self._host.link_speeds.add(decode_address, result.num_stored_bytes, result.busy_s)
        self._host.counters["blocks_pushed"] += result.num_blocks
        self._host.counters["bytes_pushed"] += result.num_bytes
        self._host.counters["frames_resent"] += result.num_resent_frames
        self._host.counters["pushes_failed"] += bool(result.error)
        span.set({"kv.blocks": result.num_blocks, "kv.bytes": result.num_bytes, "kv.resent": result.num_resent_frames})
        span.set({"kv.transport": result.transport, "kv.refusal": result.refusal})
        if result.error:
            span.fail(result.error)
            _log.warning("push incomplete", request_id=submission.work.request_id, error=result.error)


@contextmanager
def _first_failure() -> Iterator[None]:
    """A task group inside raises its first `KvrelayError` itself: the session tells the coordinator."""
    try:
        yield
    except ExceptionGroup as group:
        for error in group.exceptions:
            if isinstance(error, KvrelayError):
                raise error from group
        raise


class _Outgoing:
    """The push of one request, fed by the engine.

    It is finished as soon as the last part is there, without waiting for the engine to close the request. The last
    tokens go out with what became of it so far.
    """

    def __init__(self, push: Push, stored: StoredPrompt, num_layers: int, sink: Sink) -> None:
        self.push = push
        self.handlers = Handlers(sink=self._tell, on_part=self._add)
        self._present = stored.present
        self._num_layers = num_layers
        self._missing_layers = len(stored.hashes) * num_layers
        self._sink = sink

    def add_present(self) -> None:
        """What the store has; pinned once."""
        for block, slot in enumerate(self._present):
            self._add(BlockPart(block, slot, 0, self._num_layers))

    def _add(self, part: BlockPart) -> None:
        self.push.add(part)
        self._missing_layers -= part.num_layers
        if not self._missing_layers:
            self.push.finish()

    def _tell(self, delta: worker_pb2.TokenDelta) -> None:
        delta.kv_failed = bool(self.push.result.error)
        if delta.finish_reason:
            sampled = (e.unix_ns for e in delta.timeline.events if e.name == "prefill.sampled")
            delta.timeline.counters["kv.wanted_bytes"] = self.push.result.num_wanted_bytes
            delta.timeline.counters["kv.hidden_bytes"] = self.push.stored_bytes_at(next(sampled, time.time_ns()))
        self._sink(delta)
