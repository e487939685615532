"""Requests whose answers from the cluster must equal those of one vLLM engine, token for token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Around one block (32 tokens on a CPU): shorter, exact multiples, one more; up to several prefill chunks.
PROMPT_LENGTHS = (1, 2, 5, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 511, 512, 513, 777, 1025, 1500)

_PROSE = (
    "The history of the lighthouse begins long before anyone thought of writing it down . In the winter of 1791 a"
    " storm broke the old wooden tower , and the keeper , whose name was Hannah , carried the lamp herself every night"
    " for two months while the masons waited for stone to arrive from the mainland by boat . She kept a small diary :"
    " wind , oil , ships that passed , and what she had cooked . Years later her grandson found it behind a loose brick"
)
_WORDS = _PROSE.split()

CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because air scatters blue light more than red light."},
        {"role": "user", "content": "And why are sunsets red?"},
    ],
)


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `prompt` is text (cut to `num_tokens`) or a conversation."""

    name: str
    prompt: str | list[dict[str, str]]
    num_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def text_of(num_words: int, start: int = 0) -> str:
    """Deterministic prose of at least as many tokens as words."""
    return " ".join(_WORDS[(start + i) % len(_WORDS)] for i in range(num_words))


def _long(name: str, **options: Any) -> Case:
    return Case(name, text_of(150, start=7), 100, {"temperature": 0.0, "max_tokens": 24, **options})


def length_cases() -> list[Case]:
    """Greedy answers to prompts of every interesting length, raw and chat."""
    greedy = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    raw = [Case(f"length-{n}", text_of(n + 8, start=n), n, greedy) for n in PROMPT_LENGTHS]
    return raw + [Case(f"chat-{i}", chat, None, greedy) for i, chat in enumerate(CONVERSATIONS)]


def option_cases() -> list[Case]:
    """One request for every sampling option, at a prompt that is handed over."""
    seeded = {"temperature": 0.9, "seed": 1234}
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    return [
        _long("seed", **seeded),
        _long("top-p", **seeded, top_p=0.7),
        _long("top-k", **seeded, top_k=5),
        _long("min-p", **seeded, min_p=0.1),
        _long("several", **seeded, n=3),
        _long("presence-penalty", presence_penalty=1.5),
        _long("frequency-penalty", frequency_penalty=1.5),
        _long("repetition-penalty", repetition_penalty=1.3),
        _long("logit-bias", logit_bias={260: 8.0, 281: -100.0}),
        _long("allowed-token-ids", allowed_token_ids=[260, 281, 282, 284, 28]),
        _long("bad-words", bad_words=["lamp", "ship"]),
        _long("min-tokens", min_tokens=20, stop_token_ids=[260, 28, 30]),
        _long("stop-token-ids", stop_token_ids=[260, 28, 30]),
        _long("ignore-eos", ignore_eos=True),
        _long("stop", stop=[" the", "and"]),
        _long("stop-included", stop=["ed "], include_stop_str_in_output=True),
        _long("logprobs", logprobs=5),
        _long("logprobs-seeded", **seeded, logprobs=3),
        _long("prompt-logprobs", prompt_logprobs=2),
        _long("max-tokens-1", max_tokens=1),
        _long("max-tokens-2", max_tokens=2),
        _long("json-schema", json_schema=schema, max_tokens=40),
        _long("json-object", json_object=True, max_tokens=30),
        _long("regex", regex="[a-f]{3}-[0-9]{4}"),
        _long("choice", choice=["lighthouse", "windmill", "bridge"]),
        _long("grammar", grammar='root ::= "ship " [0-9]+ "."', max_tokens=12),
    ]


def handover_cases() -> list[Case]:
    """Greedy answers to prompts without a common block, several of each length; every block is handed over."""
    options = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    lengths = [40, 128, 300] * 3
    return [Case(f"{n}-{i}", text_of(n + 8, start=7 * i), n, options) for i, n in enumerate(lengths)]


CASES: dict[str, Callable[[], list[Case]]] = {
    "all": lambda: [*length_cases(), *option_cases()],
    "handover": handover_cases,
}
"""For `reference_engine`, which runs in a process of its own."""
