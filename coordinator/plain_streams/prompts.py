"""How do plain prompts become token ids? As vLLM's renderer has them; of short ones in the event loop itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from vllm.renderers import BaseRenderer
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.renderers.params import ChatParams, TokenizeParams

MAX_TEXT_CHARS = 8192
"""A prompt of so many is tokenized in about two milliseconds: as long may the event loop stand still for it."""

_SAMPLES = (
    "",
    " Two  spaces, a\ttab\r\nand lines\n\n.",
    "Größe, 東京, ελληνικά, العربية, 👩‍👩‍👧 e\u0301 \u200b\u00a0",
    "<|im_start|>user\n[INST] <s> </s> <|endoftext|> <bos> <pad> <unk>",
    "def f(x): return x**2 # 1234567890 0x1F https://example.org/a?b=c",
)

_Encode = Callable[[str, bool], Sequence[int]]


class PlainPrompts:
    """Of requests that `is_plain`."""

    def __init__(self, renderer: BaseRenderer) -> None:
        self._renderer = renderer
        self._encode = _encoder_like(renderer.get_tokenizer())

    async def token_ids(
        self, fields: Mapping[str, Any], chat: ChatParams | None, tokenizing: TokenizeParams
    ) -> Sequence[int]:
        """Raises what vLLM raises for prompts that cannot be rendered."""
        if chat is None and not isinstance(fields["prompt"], str):
            return list(fields["prompt"])
        if _num_text_chars(fields) > MAX_TEXT_CHARS or self._encode is None:
            return await self._by_renderer(fields, chat, tokenizing)
        if chat is None:
            return self._encode(fields["prompt"], tokenizing.add_special_tokens)
        _, prompt = self._renderer.render_messages(fields["messages"], chat)
        if "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"])
        return self._encode(prompt["prompt"], tokenizing.add_special_tokens)

    async def _by_renderer(
        self, fields: Mapping[str, Any], chat: ChatParams | None, tokenizing: TokenizeParams
    ) -> Sequence[int]:
        """In its threads."""
        if chat is not None:
            _, (prompt,) = await self._renderer.render_chat_async([fields["messages"]], chat, tokenizing)
        else:
            parsed = parse_model_prompt(self._renderer.model_config, fields["prompt"])
            (prompt,) = await self._renderer.render_cmpl_async([parsed], tokenizing)
        token_ids: Sequence[int] = prompt["prompt_token_ids"]
        return token_ids


def _num_text_chars(fields: Mapping[str, Any]) -> int:
    if "messages" in fields:
        return sum(len(message["content"]) for message in fields["messages"])
    return len(fields["prompt"])


def _encoder_like(tokenizer: Any) -> _Encode | None:
    """The Rust tokenizer below one of Hugging Face's, if it does the same by itself; half of the time is in between."""
    backend = getattr(tokenizer, "_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    own = Tokenizer.from_str(backend.to_str())  # Theirs changes with the truncation of every call.
    own.no_truncation()
    own.no_padding()

    def encode(text: str, add_special_tokens: bool) -> Sequence[int]:
        ids: list[int] = own.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    for text in _SAMPLES:
        for special in (False, True):
            if encode(text, special) != tokenizer(text, add_special_tokens=special)["input_ids"]:
                return None
    return encode
