"""In which form is a request of a load put to a server?"""

from __future__ import annotations

import enum


class Api(enum.StrEnum):
    """OpenAI's two."""

    COMPLETIONS = "completions"
    CHAT = "chat"


class PromptKind(enum.StrEnum):
    """What a prompt is made of."""

    TOKENS = "tokens"
    """Token ids: as long as in the trace, exactly."""
    TEXT = "text"
    """A word per token: about as long, as the server's tokenizer has it."""


class TooLong(enum.StrEnum):
    """What becomes of a request that does not fit into the model's context."""

    CLIP = "clip"
    """Its answer is cut to what the context holds at most, then its prompt to what is left, from its end."""
    SKIP = "skip"
