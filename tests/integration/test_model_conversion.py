"""The default model, really converted: what vLLM needs is there, in the precision that is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from kvrelay.models import DEFAULT_MODEL, ModelError, prepare_default, resolve_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    resolved = resolve_model("", tmp_path_factory.mktemp("cache"))
    assert (resolved.served_name, resolved.is_local) == (DEFAULT_MODEL, True)
    return Path(resolved.path)


def test_tensors_are_bfloat16(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in found.values()) == 134_515_008
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_the_configuration_names_a_model_that_is_not_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_the_tokenizer_has_a_chat_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode("naïve 你好")) == "naïve 你好"


def test_nothing_but_the_model_is_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.parent.iterdir()) == [DEFAULT_MODEL, f"{DEFAULT_MODEL}.lock"]


def test_a_broken_file_is_refused_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    monkeypatch.setattr("kvrelay.models._default_gguf", lambda: broken)
    with pytest.raises(ModelError, match=r"broken\.gguf could not be converted:\n(?s:.*)Error: "):
        prepare_default(tmp_path / "cache", lambda _: None)
