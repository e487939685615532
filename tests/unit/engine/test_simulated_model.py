"""The simulated model: tokens and block contents follow from the tokens before them, and from nothing else."""

import pytest

from kvrelay.engine.simulated_model import (
    KvContentError,
    SimulatedConfig,
    TokenChain,
    block_content,
    check_block,
    expected_tokens,
    next_token,
    top_tokens,
)

CONFIG = SimulatedConfig(block_size_tokens=4, num_layers=3)


def test_a_continuation_after_a_hand_off_is_the_same() -> None:
    whole = expected_tokens([5, 6, 7], 10, CONFIG)
    assert expected_tokens([5, 6, 7, *whole[:4]], 6, CONFIG) == whole[4:]


def test_any_earlier_token_changes_the_next_one() -> None:
    assert expected_tokens([1, 2, 3], 4, CONFIG) != expected_tokens([9, 2, 3], 4, CONFIG)


def test_a_seed_of_the_request_or_of_the_model_changes_the_tokens() -> None:
    plain = expected_tokens([1, 2, 3], 4, CONFIG)
    assert expected_tokens([1, 2, 3], 4, CONFIG, seed=7) != plain
    other = SimulatedConfig(block_size_tokens=4, num_layers=3, seed=1)
    assert expected_tokens([1, 2, 3], 4, other) != plain


def test_eos_comes_as_often_as_asked_and_never_otherwise() -> None:
    assert CONFIG.eos_token_id not in expected_tokens([1], 500, CONFIG)
    often = expected_tokens([1], 500, SimulatedConfig(eos_rate=0.5))
    assert 180 < often.count(CONFIG.eos_token_id) < 320


def test_forbidden_tokens_are_avoided() -> None:
    digest = TokenChain(CONFIG, [1, 2]).digest()
    token = next_token(CONFIG, digest)
    assert next_token(CONFIG, digest, never={token}) != token


def test_appending_in_pieces_gives_the_same_digests() -> None:
    whole = TokenChain(CONFIG, range(11))
    pieces = TokenChain(CONFIG)
    for part in (range(3), range(3, 9), range(9, 11)):
        pieces.append(part)
    assert len(whole.block_digests) == 2
    assert (pieces.block_digests, pieces.digest()) == (whole.block_digests, whole.digest())


def test_block_contents_differ_by_tokens_place_and_layer() -> None:
    digest = TokenChain(CONFIG, range(4)).block_digests[0]
    content = block_content(CONFIG, digest, 0)
    assert len(content) == CONFIG.block_bytes
    layers = {content[i * CONFIG.layer_bytes : (i + 1) * CONFIG.layer_bytes] for i in range(3)}
    assert len(layers) == 3
    assert content != block_content(CONFIG, digest, 1)
    assert content != block_content(CONFIG, TokenChain(CONFIG, range(1, 5)).block_digests[0], 0)


def test_a_wrong_block_is_named_with_its_first_wrong_layer() -> None:
    digest = TokenChain(CONFIG, range(4)).block_digests[0]
    content = bytearray(block_content(CONFIG, digest, 0))
    check_block(CONFIG, [digest], 0, 9, bytes(content))
    content[CONFIG.layer_bytes + 1] ^= 1
    with pytest.raises(KvContentError, match=r"slot 9 does not hold KV block 0 .* layer: 1"):
        check_block(CONFIG, [digest], 0, 9, bytes(content))


def test_log_probabilities_start_with_the_chosen_token_and_fall() -> None:
    row = top_tokens(CONFIG, b"x" * 32, chosen=17, width=6)
    assert row[0][0] == 17
    assert len({token for token, _ in row}) == 6
    assert [logprob for _, logprob in row] == sorted((logprob for _, logprob in row), reverse=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int4"}, "dtype 'int4' is unknown"),
        ({"num_engine_blocks": 3}, "cannot hold one request"),
        ({"eos_token_id": 49_152}, "outside the vocabulary"),
        ({"head_elements": 1, "num_kv_heads": 1, "block_size_tokens": 1, "num_engine_blocks": 9999}, "multiple of 32"),
    ],
)
def test_impossible_shapes_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedConfig(**wrong)  # type: ignore[arg-type]


def test_a_step_costs_what_is_in_it() -> None:
    config = SimulatedConfig(
        prefill_tokens_per_s=100, prefill_overhead_s=1, decode_step_s=10, request_step_s=0.5, time_scale=2
    )
    assert config.step_s(0, 0, any_decode=False) == 0
    assert config.step_s(50, 1, any_decode=False) == 2 * (0.5 + 1 + 0.5)
    assert config.step_s(50, 3, any_decode=True) == 2 * (0.5 + 1 + 10 + 1.5)
