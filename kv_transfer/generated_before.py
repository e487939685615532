"""What in a prompt did another engine generate for the same request, and what does a grammar make of it?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

NUM_GENERATED_TOKENS = "kvrelay_num_generated_tokens"
"""In the `extra_args` of vLLM's sampling parameters."""


def generated_before(prompt_token_ids: Sequence[int] | None, extra_args: dict[str, object] | None) -> Sequence[int]:
    """The end of a prompt that was generated; empty for most."""
    num_tokens = (extra_args or {}).get(NUM_GENERATED_TOKENS, 0)
    if not isinstance(num_tokens, int) or num_tokens < 1 or prompt_token_ids is None:
        return ()
    return prompt_token_ids[-num_tokens:]


class GrammarReplay:
    """Lets the grammar of a request accept what was generated before, once, before it is asked for the next token.

    On the scheduler's side: vLLM asks the connector about a request that waits once its grammar is compiled.
    """

    def __init__(self) -> None:
        self._due: set[str] = set()

    def add(self, request: Request) -> None:
        """A request has come."""
        params = request.sampling_params
        is_constrained = request.structured_output_request is not None and params is not None
        if is_constrained and generated_before(request.prompt_token_ids, params.extra_args):
            self._due.add(request.request_id)

    def replay(self, request: Request) -> None:
        """Its grammar is compiled, and it is about to be scheduled, perhaps not for the first time."""
        if request.request_id not in self._due:
            return
        self._due.discard(request.request_id)
        structured = request.structured_output_request
        grammar = structured.grammar if structured is not None else None
        if grammar is None or isinstance(grammar, Exception):  # vLLM fails the request itself.
            return
        tokens = list(generated_before(request.prompt_token_ids, request.sampling_params.extra_args))
        if not grammar.accept_tokens(request.request_id, tokens):
            logger.error("request %s: its grammar does not accept what was generated before", request.request_id)

    def discard(self, request_id: str) -> None:
        """The request is over."""
        self._due.discard(request_id)
