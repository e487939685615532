"""Copies of a model are one model; anything that changes its KV makes it another."""

from __future__ import annotations

from pathlib import Path

from kvrelay.engine.model_identity import model_identity


class Configuration:
    def __init__(self, **values: object) -> None:
        self._values = values

    def to_dict(self) -> dict[str, object]:
        return dict(self._values)


def folder(parent: Path, name: str, weights: bytes) -> str:
    path = parent / name
    path.mkdir()
    (path / "model.safetensors").write_bytes(weights)
    return str(path)


def test_copies_are_the_same_model(tmp_path: Path) -> None:
    one, two = folder(tmp_path, "one", b"w" * 100), folder(tmp_path, "two", b"w" * 100)
    first = model_identity(one, Configuration(layers=2, _name_or_path=one, transformers_version="4"))
    assert first == model_identity(two, Configuration(layers=2, _name_or_path=two, transformers_version="5"))
    assert len(first) == 16


def test_other_weights_or_settings_are_another_model(tmp_path: Path) -> None:
    one, two = folder(tmp_path, "one", b"w" * 100), folder(tmp_path, "two", b"v" * 100)
    late = folder(tmp_path, "late", b"w" * (3 << 20) + b"v")
    early = folder(tmp_path, "early", b"w" * ((3 << 20) + 1))
    identities = [
        model_identity(one, Configuration(rope_theta=1)),
        model_identity(two, Configuration(rope_theta=1)),
        model_identity(one, Configuration(rope_theta=2)),
        model_identity(late, Configuration(rope_theta=1)),
        model_identity(early, Configuration(rope_theta=1)),
        model_identity("org/model", Configuration(rope_theta=1, _commit_hash="a")),
        model_identity("org/model", Configuration(rope_theta=1, _commit_hash="b")),
    ]
    assert len(set(identities)) == len(identities)
