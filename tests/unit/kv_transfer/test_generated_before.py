"""A grammar accepts what was generated before, once, whatever comes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvrelay.kv_transfer.generated_before import NUM_GENERATED_TOKENS, GrammarReplay, generated_before


class Grammar:
    def __init__(self, *, accepts: bool = True) -> None:
        self.accepted: list[list[int]] = []
        self._accepts = accepts

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.accepted.append(tokens)
        return self._accepts


def request(grammar: object, num_generated: int = 2) -> Any:
    return SimpleNamespace(
        request_id="r",
        prompt_token_ids=[1, 2, 3, 4],
        sampling_params=SimpleNamespace(extra_args={NUM_GENERATED_TOKENS: num_generated}),
        structured_output_request=None if grammar is None else SimpleNamespace(grammar=grammar),
    )


def test_it_accepts_the_end_of_the_prompt_once() -> None:
    grammar, replay = Grammar(), GrammarReplay()
    constrained = request(grammar)
    replay.add(constrained)
    for _ in range(2):
        replay.replay(constrained)
    assert grammar.accepted == [[3, 4]]


def test_what_it_does_not_accept_harms_nobody() -> None:
    grammar, replay = Grammar(accepts=False), GrammarReplay()
    constrained = request(grammar)
    replay.add(constrained)
    replay.replay(constrained)
    assert grammar.accepted == [[3, 4]]


@pytest.mark.parametrize("grammar", [None, ValueError("does not compile")])
def test_without_a_grammar_nothing_happens(grammar: object) -> None:
    replay = GrammarReplay()
    replay.add(request(grammar))
    replay.replay(request(grammar))


def test_a_request_that_is_over_is_forgotten() -> None:
    grammar, replay = Grammar(), GrammarReplay()
    replay.add(request(grammar))
    replay.discard("r")
    replay.replay(request(grammar))
    assert not grammar.accepted


@pytest.mark.parametrize("extra_args", [None, {}, {NUM_GENERATED_TOKENS: 0}, {NUM_GENERATED_TOKENS: "2"}])
def test_most_prompts_were_not_generated(extra_args: dict[str, object] | None) -> None:
    assert not generated_before([1, 2, 3], extra_args)
    assert not generated_before(None, {NUM_GENERATED_TOKENS: 2})
