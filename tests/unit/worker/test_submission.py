"""However the engine's reports and the tokens come in, every block gets its name and every slot comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvrelay.block_hash import BlockHasher, layout_fingerprint
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2
from kvrelay.worker.submission import Submission
from kvrelay.worker.work import Work

BLOCK = 4
LENGTH = common_pb2.FINISH_REASON_LENGTH
LAYOUT = cluster_pb2.KvLayout(block_size_tokens=BLOCK)
LAYOUT.fingerprint = layout_fingerprint(LAYOUT)
PROMPT = list(range(10))
"""Two blocks and a half."""


def names(tokens: list[int]) -> list[bytes]:
    return BlockHasher(LAYOUT, "", tokens).all_hashes()


@dataclass
class Rig:
    """A request with one loaded block, one block to save and, if asked for, the half one too; two granted slots."""

    save_partial: bool = False
    with_handler: bool = False
    deltas: list[worker_pb2.TokenDelta] = field(default_factory=list)
    handled: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = BlockStore(8)
        [slot] = self.store.reserve(1)
        self.load = [self.store.commit(slot, names(PROMPT)[0])]
        save = self.store.reserve(2 if self.save_partial else 1)
        self.saving = {1 + i: slot for i, slot in enumerate(save)}
        self.granted = self.store.grant(2)
        self.submission = Submission(
            7,
            self.work(),
            self.store,
            BlockHasher(LAYOUT, "", PROMPT),
            load=self.load,
            saving=self.saving,
            names=names(PROMPT)[: 3 if self.save_partial else 2],
            sink=self.deltas.append,
            on_block=self.handle if self.with_handler else None,
        )

    def work(self) -> Work:
        return Work(
            name="decode",
            request_id="r",
            prompt_token_ids=PROMPT,
            sampling=common_pb2.SamplingParams(),
            cache_salt="",
            priority=0,
            trace=common_pb2.TraceContext(),
        )

    def handle(self, block: int, slot: int) -> None:
        self.handled.append((block, slot))
        self.store.unpin([slot])

    def tokens(self, *tokens: int, finish: common_pb2.FinishReason.ValueType = LENGTH) -> None:
        """The engine's delta under its own id; the last one by default."""
        delta = worker_pb2.TokenDelta(request_id="r.7", token_ids=tokens, finish_reason=finish)
        delta.timeline.events.add(name="sampled", unix_ns=5)
        self.submission.add_delta(delta)

    def assert_over(self, *, num_granted: int) -> None:
        usage = self.store.usage()
        assert (usage.num_reserved, usage.num_pinned, usage.num_granted) == (0, 0, num_granted)
        assert self.submission.ended.is_set()
        assert self.submission.closed.is_set()


def test_a_loaded_slot_is_held_until_it_was_read() -> None:
    rig = Rig()
    assert rig.store.usage().num_pinned == 1
    rig.submission.loaded(2)
    assert rig.store.usage().num_pinned == 0
    rig.submission.loaded(2)


def test_prompt_blocks_are_stored_under_their_names() -> None:
    rig = Rig(save_partial=True, with_handler=True)
    rig.submission.saved(1, rig.saving[1])
    rig.submission.saved(2, rig.saving[2])
    assert rig.store.match(names(PROMPT)) == [rig.load[0], rig.saving[1], rig.saving[2]]
    assert rig.handled == [(1, rig.saving[1]), (2, rig.saving[2])]
    rig.tokens(1)
    rig.submission.close()
    rig.assert_over(num_granted=2)


def test_a_generated_block_gets_its_name_with_its_last_token() -> None:
    rig = Rig()
    rig.submission.saved(1, rig.saving[1])
    rig.tokens(50, finish=common_pb2.FINISH_REASON_UNSPECIFIED)
    rig.submission.saved(2, rig.granted[0])
    assert rig.store.usage().num_granted == 2, "its last token is not known yet"
    rig.tokens(51)
    assert rig.store.find(names([*PROMPT, 50, 51])[2]) == rig.granted[0]
    rig.submission.close()
    rig.assert_over(num_granted=1)


@pytest.mark.parametrize(
    "order", [("saved", "tokens", "close"), ("saved", "close", "tokens"), ("tokens", "saved", "close")]
)
def test_a_generated_block_is_stored_whichever_news_comes_first(order: tuple[str, ...]) -> None:
    """Tokens and reports take different ways; only CLOSED never comes before SAVED."""
    rig = Rig()
    for event in order:
        if event == "saved":
            rig.submission.saved(2, rig.granted[0])
        elif event == "tokens":
            rig.tokens(50, 51)
        else:
            rig.submission.close()
    assert rig.store.find(names([*PROMPT, 50, 51])[2]) == rig.granted[0]
    rig.assert_over(num_granted=1)


@pytest.mark.parametrize("end_first", [True, False])
def test_a_request_that_ends_without_its_tokens_gives_everything_back(end_first: bool) -> None:
    rig = Rig(save_partial=True)
    rig.submission.saved(3, rig.granted[0])
    if end_first:
        rig.submission.end()
        assert rig.store.usage().num_reserved == 2, "the engine may still write"
        rig.submission.close()
    else:
        rig.submission.close()
        rig.submission.end()
    rig.assert_over(num_granted=1)
    assert len(rig.store.match(names(PROMPT))) == 1


def test_a_block_that_somebody_else_stored_meanwhile_is_kept_once() -> None:
    rig = Rig(with_handler=True)
    [slot] = rig.store.reserve(1)
    rig.store.commit(slot, names(PROMPT)[1])
    rig.submission.saved(1, rig.saving[1])
    assert rig.handled == [(1, slot)]
    rig.store.unpin([slot])
    rig.tokens(1)
    rig.submission.close()
    rig.assert_over(num_granted=2)


def test_the_last_delta_carries_the_requests_own_id_and_its_timeline() -> None:
    rig = Rig()
    rig.tokens(50, finish=common_pb2.FINISH_REASON_UNSPECIFIED)
    rig.tokens(51)
    assert [delta.request_id for delta in rig.deltas] == ["r", "r"]
    assert not rig.deltas[0].HasField("timeline")
    names_ = [event.name for event in rig.deltas[1].timeline.events]
    assert names_ == ["decode.sampled", "decode.sampled", "decode.last_token"]
    assert rig.submission.ended.is_set()


def test_engine_ids_of_two_submissions_of_one_request_differ() -> None:
    assert Rig().submission.engine_request_id == "r.7"
