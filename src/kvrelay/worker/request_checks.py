"""What must a request not contain, or it could harm the engine?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kvrelay.engine.base import EngineInfo
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import common_pb2


def check_request(info: EngineInfo, prompt_token_ids: Sequence[int], params: common_pb2.SamplingParams) -> None:
    """Raises `InvalidRequestError`.

    The coordinator has checked already; a worker does not rely on it.
    """
    limit = info.max_model_len_tokens
    if not 0 < len(prompt_token_ids) < limit:
        raise InvalidRequestError(
            f"the prompt has {len(prompt_token_ids)} tokens; allowed are 1 to {limit - 1}", field="prompt"
        )
    if not all(word.ids for word in params.bad_words_token_ids):
        raise InvalidRequestError("a word of bad_words has no tokens", field="bad_words")
    words = itertools.chain.from_iterable(word.ids for word in params.bad_words_token_ids)
    ids = itertools.chain(
        prompt_token_ids, params.allowed_token_ids, params.logit_bias, params.all_stop_token_ids, words
    )
    if max(ids) >= info.vocab_size:
        raise InvalidRequestError(
            f"a token id is outside of the vocabulary of {info.vocab_size} tokens", field="prompt"
        )
    if params.HasField("max_tokens") and params.max_tokens < 1:
        raise InvalidRequestError("max_tokens is 0; at least one token is generated", field="max_tokens")
