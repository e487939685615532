"""A prompt is found at, promised to and retracted from workers, by the names that their layouts give its blocks."""

from __future__ import annotations

from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.keys import prompt_keys
from kvrelay.coordinator.prefix_index.prompt import IndexedPrompt
from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.v1 import cluster_pb2

TOKENS = list(range(100, 142))


def worker(worker_id: str, fingerprint: bytes = b"f" * 16, block_size_tokens: int = 4) -> WorkerView:
    return WorkerView(
        worker_id=worker_id, role=cluster_pb2.ROLE_BOTH, model="m", address=f"{worker_id}:1", fingerprint=fingerprint,
        block_size_tokens=block_size_tokens, max_model_len_tokens=64,
    )  # fmt: skip


A, B = worker("a"), worker("b")
OTHER = worker("o", b"o" * 16, 16)


def prompt(index: PrefixIndex, *workers: WorkerView, salt: str = "", now_s: float = 0.0) -> IndexedPrompt:
    return IndexedPrompt(index, salt, TOKENS, workers, now_s)


def test_what_workers_have_is_found_by_each_layout() -> None:
    index = PrefixIndex()
    index.add("a", prompt_keys(A.fingerprint, "", 4, TOKENS[:13]))
    index.add("o", prompt_keys(OTHER.fingerprint, "", 16, TOKENS))
    assert prompt(index, A, B, OTHER).num_stored_blocks() == {"a": 3, "o": 2}
    assert prompt(index, A, B).num_stored_blocks() == {"a": 3}
    assert prompt(index, A, B, salt="s").num_stored_blocks() == {}


def test_a_promise_counts_at_once_and_until_it_is_retracted() -> None:
    index = PrefixIndex()
    first, second = prompt(index, A, B, now_s=1.0), prompt(index, A, B, now_s=2.0)
    first.promise(A)
    second.promise(B)
    assert second.num_stored_blocks() == {"a": 10, "b": 10}
    first.retract(A)
    first.retract(B)
    assert second.num_stored_blocks() == {"b": 10}, "what another dispatch has promised stays"


def test_a_short_prompt_is_nowhere() -> None:
    index = PrefixIndex()
    short = IndexedPrompt(index, "", TOKENS[:3], [A], 0.0)
    short.promise(A)
    assert short.num_stored_blocks() == {}
    assert index.num_blocks == 0


def test_a_worker_that_came_later_is_promised_nothing() -> None:
    index = PrefixIndex()
    dispatched = prompt(index, A)
    dispatched.promise(OTHER)
    dispatched.retract(OTHER)
    assert index.num_blocks == 0
