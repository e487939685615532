"""Which blocks does a simulated step write to which slots? What the connector inside vLLM would do, without a pipe."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvrelay.engine.base import KvReport, KvReportKind
from kvrelay.engine.simulated_batch import SequenceState, Work
from kvrelay.engine.simulated_model import SimulatedConfig, block_content
from kvrelay.kv_transfer.segment import Segment


@dataclass(frozen=True, slots=True)
class DueBlock:
    """A block that this step completes."""

    sequence: SequenceState
    block: int
    slot: int
    content: bytes


class Saver:
    """Writes blocks of prompts group of layers by group of layers, and blocks of generated tokens whole."""

    def __init__(self, config: SimulatedConfig, segment: Segment) -> None:
        self._config = config
        self._segment = segment
        self._granted: deque[int] = deque()

    def grant(self, slots: Sequence[int]) -> None:
        """Slots for blocks beyond the requests' own."""
        self._granted.extend(slots)

    def due(self, work: Sequence[Work]) -> list[DueBlock]:
        """The blocks that `work` completes and that have slots of their own."""
        return [block for item in work for block in self._due(item)]

    def _due(self, item: Work) -> Iterator[DueBlock]:
        sequence, kv = item.sequence, item.sequence.request.kv
        end = sequence.num_computed_tokens + item.num_tokens
        num_complete, rest = divmod(end, self._config.block_size_tokens)
        digests = sequence.chain.block_digests
        if rest and end == kv.partial_tokens:
            num_complete += 1
            digests = [*digests, sequence.chain.digest()]
        first, last = sequence.num_saved_blocks, min(num_complete, kv.first_save + len(kv.save))
        for block in range(first, last):
            content = block_content(self._config, digests[block], block)
            yield DueBlock(sequence, block, kv.save[block - kv.first_save], content)
            sequence.num_saved_blocks = block + 1

    def save_layers(self, blocks: Sequence[DueBlock], group: int) -> list[KvReport]:
        """Write one of the groups of layers."""
        groups, num_layers = self._config.layer_groups, self._config.num_layers
        first, end = group * num_layers // groups, (group + 1) * num_layers // groups
        layers = slice(first * self._config.layer_bytes, end * self._config.layer_bytes)
        reports = []
        for due in blocks:
            if due.sequence.over:  # Aborted meanwhile: its slots belong to somebody else.
                continue
            self._segment.slot_view(due.slot)[layers] = due.content[layers]
            ticket = due.sequence.request.kv.ticket
            reports.append(KvReport(KvReportKind.SAVED, ticket, due.block, due.slot, first, end - first))
        return reports

    def save_generated(self, sequence: SequenceState) -> list[KvReport]:
        """Write what is complete now to granted slots; a block without a slot ends the saving of its request.

        Whatever came after the gap could not be found by a prefix.
        """
        kv, num_layers = sequence.request.kv, self._config.num_layers
        num_complete = sequence.num_computed_tokens // self._config.block_size_tokens
        reports = []
        for block in range(sequence.num_saved_blocks, num_complete):
            sequence.saving = sequence.saving and bool(self._granted)
            if not sequence.saving:
                break
            slot = self._granted.popleft()
            digest = sequence.chain.block_digests[block]
            self._segment.slot_view(slot)[:] = block_content(self._config, digest, block)
            reports.append(KvReport(KvReportKind.SAVED, kv.ticket, block, slot, 0, num_layers))
            sequence.num_saved_blocks = block + 1
        return reports
