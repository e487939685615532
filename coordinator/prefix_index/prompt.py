"""What of one prompt do the workers have, and what will they have once it is served?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.keys import prompt_keys
from kvrelay.coordinator.scheduler.view import WorkerView


class IndexedPrompt:
    """The full blocks of a prompt, in the index.

    Workers whose layouts differ have other names for the same blocks; names are made for the layouts of `workers`.
    """

    def __init__(
        self,
        index: PrefixIndex,
        cache_salt: str,
        token_ids: Sequence[int],
        workers: Iterable[WorkerView],
        now_s: float,
    ) -> None:
        """`now_s` is that of the dispatch, and must not fall from prompt to prompt."""
        self._index = index
        self._now_s = now_s
        layouts = {worker.fingerprint: worker.block_size_tokens for worker in workers}
        self._keys = {
            fingerprint: prompt_keys(fingerprint, cache_salt, block_size_tokens, token_ids)
            for fingerprint, block_size_tokens in layouts.items()
            if 0 < block_size_tokens <= len(token_ids)
        }

    def num_stored_blocks(self) -> dict[str, int]:
        """Worker id -> blocks of the prompt's prefix that it has; who has none is left out."""
        found: dict[str, int] = {}
        for keys in self._keys.values():
            found |= self._index.match(keys)
        return found

    def promise(self, worker: WorkerView) -> None:
        """The worker was chosen: it will have the whole prompt. Expires unless the worker confirms it."""
        keys = self._keys.get(worker.fingerprint)
        if keys is not None:
            self._index.speculate(worker.worker_id, keys, self._now_s)

    def retract(self, worker: WorkerView) -> None:
        """The worker does not get the prompt after all."""
        keys = self._keys.get(worker.fingerprint)
        if keys is not None:
            self._index.retract(worker.worker_id, keys, self._now_s)
