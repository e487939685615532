"""What would the simulated model say, and what would its KV blocks hold? Both follow from the tokens alone."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from kvrelay.block_hash import layout_fingerprint
from kvrelay.engine.base import EngineDeadError
from kvrelay.v1 import cluster_pb2

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_PATTERN_BYTES = 32


class KvContentError(EngineDeadError):
    """A loaded KV block does not hold what these tokens would have computed: the hand-off is broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedConfig:
    """Shape and speed of the simulated model. Raises `ValueError` when it could not run."""

    model: str = "simulated"
    num_layers: int = 4
    num_kv_heads: int = 2
    head_elements: int = 32
    """K and V together, for one token and head."""
    dtype: str = "bfloat16"
    block_size_tokens: int = 16
    vocab_size: int = 49_152
    """The default model's, so that its tokenizer can stand in front."""
    max_model_len_tokens: int = 4096
    num_engine_blocks: int = 2048
    eos_token_id: int = 2
    eos_rate: float = 0.0
    """Share of the generated tokens that are EOS."""
    seed: int = 0
    """Two engines with the same seed and shape are the same model."""

    prefill_tokens_per_s: float = 10_000.0
    prefill_overhead_s: float = 0.002
    """Added to a step that computes prompt tokens."""
    decode_step_s: float = 0.01
    """Added to a step in which at least one request decodes."""
    request_step_s: float = 0.0001
    """Added to a step for every request in it."""
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    """Most tokens of one step; longer prompts are computed in chunks."""
    layer_groups: int = 1
    """In how many pieces blocks of a prompt are saved, spread evenly over the step that computes them."""
    time_scale: float = 1.0
    """0 runs as fast as possible."""

    def __post_init__(self) -> None:
        if not 1 <= self.layer_groups <= self.num_layers:
            raise ValueError(f"layer_groups is {self.layer_groups}; use 1..{self.num_layers}, the number of layers")
        if self.dtype not in _ELEMENT_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(_ELEMENT_BYTES)}")
        if self.num_engine_blocks * self.block_size_tokens < self.max_model_len_tokens:
            raise ValueError(
                f"{self.num_engine_blocks} engine blocks of {self.block_size_tokens} tokens cannot hold one request of"
                f" {self.max_model_len_tokens} tokens; raise num_engine_blocks or lower max_model_len_tokens"
            )
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is outside the vocabulary of {self.vocab_size} tokens")
        if self.layer_bytes % _PATTERN_BYTES:
            raise ValueError(f"{self.layer_bytes} bytes of one layer's block are not a multiple of {_PATTERN_BYTES}")

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one KV block, all heads."""
        per_token = self.num_kv_heads * self.head_elements * _ELEMENT_BYTES[self.dtype]
        return self.block_size_tokens * per_token

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block, all layers."""
        return self.num_layers * self.layer_bytes

    def layout(self) -> cluster_pb2.KvLayout:
        """The layout that two workers compare before KV moves; the seed stands for the weights."""
        layout = cluster_pb2.KvLayout(
            model=f"{self.model}#{self.seed}",
            dtype=self.dtype,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_elements=self.head_elements,
            block_size_tokens=self.block_size_tokens,
        )
        layout.fingerprint = layout_fingerprint(layout)
        return layout

    def step_s(self, num_prefill_tokens: int, num_requests: int, *, any_decode: bool) -> float:
        """How long a real engine would take for a step."""
        cost_s = num_requests * self.request_step_s
        if num_prefill_tokens:
            cost_s += self.prefill_overhead_s + num_prefill_tokens / self.prefill_tokens_per_s
        if any_decode:
            cost_s += self.decode_step_s
        return cost_s * self.time_scale


class TokenChain:
    """Digest of a token sequence that grows, and of every full block's end in it."""

    def __init__(self, config: SimulatedConfig, token_ids: Iterable[int] = ()) -> None:
        self._hash = sha256(struct.pack("<q", config.seed))
        self._block_size = config.block_size_tokens
        self._num_tokens = 0
        self.block_digests: list[bytes] = []
        self.append(token_ids)

    def append(self, token_ids: Iterable[int]) -> None:
        """Add tokens; `block_digests` grows by one for each block that they complete."""
        pending = array("I", token_ids)
        while pending:
            room = self._block_size - self._num_tokens % self._block_size
            part, pending = pending[:room], pending[room:]
            self._hash.update(part.tobytes())
            self._num_tokens += len(part)
            if len(part) == room:
                self.block_digests.append(self.digest())

    def digest(self) -> bytes:
        """Digest of all tokens so far."""
        return self._hash.copy().digest()


def next_token(config: SimulatedConfig, digest: bytes, seed: int | None = None, never: Container[int] = ()) -> int:
    """The token after the sequence that `digest` stands for, outside `never` unless that is hopeless.

    A seed of the request gives other tokens, as it would in a real engine.
    """
    for attempt in range(1000):
        tail = struct.pack("<Iq", attempt, -1 if seed is None else seed)
        draw, value = struct.unpack_from("<IQ", sha256(digest + tail).digest())
        if draw < config.eos_rate * 2**32:
            token = config.eos_token_id
        else:
            token = value % (config.vocab_size - 1)
            token += token >= config.eos_token_id
        if token not in never:
            break
    return token


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, config: SimulatedConfig, seed: int | None = None
) -> list[int]:
    """What an engine with `config` generates after `prompt`; nothing stops it, not even EOS."""
    chain = TokenChain(config, prompt)
    output = []
    for _ in range(num_tokens):
        token = next_token(config, chain.digest(), seed)
        output.append(token)
        chain.append([token])
    return output


def top_tokens(config: SimulatedConfig, digest: bytes, chosen: int, width: int) -> list[tuple[int, float]]:
    """Made-up log probabilities: `width` tokens, most likely first, starting with `chosen`."""
    first = sha256(digest + b"logprob").digest()
    logprob = -first[0] / 512
    row = [(chosen, logprob)]
    step = 0
    while len(row) < min(width, config.vocab_size):
        token = (first[1] + step) % config.vocab_size
        step += 1
        if token != chosen:
            logprob -= 0.5 + first[step % len(first)] / 256
            row.append((token, logprob))
    return row


def block_content(config: SimulatedConfig, digest: bytes, block: int) -> bytes:
    """Content of KV block number `block`, where `digest` is the chain's digest at its end.

    Every layer differs, and nothing but the same tokens in the same place gives the same bytes.
    """
    repeat = config.layer_bytes // _PATTERN_BYTES
    layers = range(config.num_layers)
    return b"".join(sha256(digest + struct.pack("<II", block, layer)).digest() * repeat for layer in layers)


def check_block(config: SimulatedConfig, digests: Sequence[bytes], block: int, slot: int, content: bytes) -> None:
    """Raises `KvContentError` naming the first wrong layer unless `content` is the block's for one of `digests`."""
    for digest in digests:
        expected = block_content(config, digest, block)
        if content == expected:
            return
    size = config.layer_bytes
    layers = range(config.num_layers)
    wrong = next(i for i in layers if content[i * size : (i + 1) * size] != expected[i * size : (i + 1) * size])
    raise KvContentError(f"slot {slot} does not hold KV block {block} of these tokens; first wrong layer: {wrong}")
