"""However the engine's reports and the tokens come in, every block gets its name and every slot comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvrelay.block_hash import BlockHasher, layout_fingerprint
from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2
from kvrelay.worker.submission import Handlers, PromptSlots, Submission
from kvrelay.worker.work import Work

BLOCK = 4
LAYERS = 6
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
    handled: list[BlockPart] = field(default_factory=list)

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
            PromptSlots(
                num_layers=LAYERS,
                load=self.load,
                load_tokens=LAYOUT.block_size_tokens,
                saving=self.saving,
                names=names(PROMPT)[: 3 if self.save_partial else 2],
            ),
            Handlers(sink=self.deltas.append, on_part=self.handle if self.with_handler else None),
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

    def handle(self, part: BlockPart) -> None:
        self.handled.append(part)

    def let_go(self) -> None:
        """What a handler owes."""
        for part in self.handled:
            self.store.unpin([part.slot])
        self.handled.clear()

    def saved(self, block: int, slot: int) -> None:
        """The engine reports a whole block."""
        assert self.submission.saved(BlockPart(block, slot, 0, LAYERS))

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
    rig.saved(1, rig.saving[1])
    rig.saved(2, rig.saving[2])
    assert rig.store.match(names(PROMPT)) == [rig.load[0], rig.saving[1], rig.saving[2]]
    assert rig.handled == [BlockPart(block, rig.saving[block], 0, LAYERS) for block in (1, 2)]
    assert rig.store.usage().num_pinned == 3
    rig.let_go()
    rig.tokens(1)
    rig.submission.close()
    rig.assert_over(num_granted=2)


def test_what_is_saved_of_a_prompt_counts_as_computed() -> None:
    rig = Rig(save_partial=True)
    counts = []
    for block in (1, 2):
        for first in (0, LAYERS // 2):
            rig.submission.saved(BlockPart(block, rig.saving[block], first, LAYERS // 2))
            counts.append(rig.submission.num_computed_tokens)
    assert counts == [0, BLOCK, BLOCK, rig.submission.num_queued_tokens]


def test_a_generated_block_gets_its_name_with_its_last_token() -> None:
    rig = Rig()
    rig.saved(1, rig.saving[1])
    rig.tokens(50, finish=common_pb2.FINISH_REASON_UNSPECIFIED)
    rig.saved(2, rig.granted[0])
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
            rig.saved(2, rig.granted[0])
        elif event == "tokens":
            rig.tokens(50, 51)
        else:
            rig.submission.close()
    assert rig.store.find(names([*PROMPT, 50, 51])[2]) == rig.granted[0]
    rig.assert_over(num_granted=1)


@pytest.mark.parametrize("end_first", [True, False])
def test_a_request_that_ends_without_its_tokens_gives_everything_back(end_first: bool) -> None:
    rig = Rig(save_partial=True)
    rig.saved(3, rig.granted[0])
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
    rig.saved(1, rig.saving[1])
    assert rig.handled == [BlockPart(1, slot, 0, LAYERS)]
    rig.let_go()
    rig.store.unpin([slot])
    rig.tokens(1)
    rig.submission.close()
    rig.assert_over(num_granted=2)


def test_parts_of_a_block_are_handed_over_as_they_come_and_stored_with_the_last() -> None:
    rig = Rig(with_handler=True)
    parts = [BlockPart(1, rig.saving[1], first, 2) for first in (0, 2, 4)]
    assert [rig.submission.saved(part) for part in parts[:2]] == [False, False]
    assert rig.handled == parts[:2]
    assert rig.store.find(names(PROMPT)[1]) is None
    assert rig.submission.saved(parts[2])
    assert rig.handled == parts
    assert rig.store.find(names(PROMPT)[1]) == rig.saving[1]
    rig.tokens(1)
    rig.submission.close()
    assert rig.store.usage().num_pinned == 1, "parts are still being sent"
    rig.let_go()
    rig.assert_over(num_granted=2)


def test_parts_that_nobody_wants_are_stored_all_the_same() -> None:
    rig = Rig()
    assert not rig.submission.saved(BlockPart(1, rig.saving[1], 0, 5))
    assert rig.submission.saved(BlockPart(1, rig.saving[1], 5, 1))
    assert rig.store.find(names(PROMPT)[1]) == rig.saving[1]
    rig.tokens(1)
    rig.submission.close()
    rig.assert_over(num_granted=2)


def test_a_slot_is_kept_for_whoever_sends_its_parts_though_its_block_was_never_completed() -> None:
    rig = Rig(with_handler=True)
    rig.submission.saved(BlockPart(1, rig.saving[1], 0, 2))
    rig.submission.end()
    rig.submission.close()
    usage = rig.store.usage()
    assert (usage.num_reserved, usage.num_free) == (1, 4)
    rig.let_go()
    rig.assert_over(num_granted=2)
    assert rig.store.find(names(PROMPT)[1]) is None


def test_the_last_part_comes_from_where_the_block_is_stored() -> None:
    """Somebody else stored it meanwhile; earlier parts stay readable where they are."""
    rig = Rig(with_handler=True)
    rig.submission.saved(BlockPart(1, rig.saving[1], 0, 4))
    [other] = rig.store.reserve(1)
    rig.store.unpin([rig.store.commit(other, names(PROMPT)[1])])
    rig.submission.saved(BlockPart(1, rig.saving[1], 4, 2))
    assert rig.handled == [BlockPart(1, rig.saving[1], 0, 4), BlockPart(1, other, 4, 2)]
    rig.tokens(1)
    rig.submission.close()
    assert rig.store.usage().num_reserved == 1
    rig.let_go()
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
