"""Which files a model's name stands for, and that the default model is made ready once, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvrelay import models
from kvrelay.models import (
    DEFAULT_MODEL,
    ModelError,
    ResolvedModel,
    default_cache_dir,
    prepare_default,
    resolve_model,
)

NUM_CALLERS = 4


class FakeConversion:
    """Counts its calls in a file, so that those of other processes count as well."""

    def __init__(self, calls: Path) -> None:
        self.calls = calls
        self.kills_its_process = False

    def __call__(self, source: Path, target: Path) -> None:
        assert source.suffix == ".gguf"
        with self.calls.open("a") as calls:
            calls.write(f"{target}\n")
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"")
        if self.kills_its_process:
            os._exit(9)

    @property
    def num_calls(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def conversion(tmp_path: Path) -> FakeConversion:
    return FakeConversion(tmp_path / "calls")


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def quietly(_: str) -> None:
    """Progress that nobody reads."""


def model_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["", DEFAULT_MODEL])
def test_no_name_means_the_default_model(name: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_dir / "models" / DEFAULT_MODEL
    monkeypatch.setattr(models, "prepare_default", lambda given, _: given / "models" / DEFAULT_MODEL)
    assert resolve_model(name, cache_dir) == ResolvedModel(str(folder), DEFAULT_MODEL, True)


def test_a_folder_is_served_by_its_own_name(tmp_path: Path, cache_dir: Path) -> None:
    folder = model_folder(tmp_path, "Llama-3")
    assert resolve_model(f"{folder}/", cache_dir) == ResolvedModel(str(folder), "Llama-3", True)


def test_a_folder_may_be_named_from_here_or_from_home(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path, "m")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = ResolvedModel(str(folder), "m", True)
    assert [resolve_model(name, cache_dir) for name in (".", "../m", "~/m")] == [expected] * 3


def test_a_folder_that_exists_goes_before_a_hub_id(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    folder = model_folder(tmp_path / "owner", "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name", cache_dir).path == str(folder)


def test_a_hub_id_is_left_to_vllm(cache_dir: Path) -> None:
    name = "HuggingFaceTB/SmolLM2-1.7B_x"
    assert resolve_model(name, cache_dir) == ResolvedModel(name, name, False)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path} is no model folder: it has no config.json"):
        resolve_model(str(tmp_path), cache_dir)


def test_a_file_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match="is a file; give a folder in Hugging Face format"):
        resolve_model(str(tmp_path / "m.gguf"), cache_dir)


@pytest.mark.parametrize(
    "name", ["/no/such", "./no", "../no", "~/no-such", "no-owner", "a/b/c", "owner/", "/", "ow ner/name", "owner/näme"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(
    name: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"no folder|no model folder") as caught:
        resolve_model(name, cache_dir)
    assert name in str(caught.value)


def test_the_cache_is_where_xdg_says() -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/kvrelay")
    assert default_cache_dir({"XDG_CACHE_HOME": "", "HOME": "/h"}) == Path("/h/.cache/kvrelay")


def test_the_default_model_is_converted_once(cache_dir: Path, conversion: FakeConversion) -> None:
    said: list[str] = []
    folders = {prepare_default(cache_dir, said.append, conversion) for _ in range(2)}
    assert folders == {cache_dir / "models" / DEFAULT_MODEL}
    assert names(folders.pop()) == ["config.json", "model.safetensors"]
    assert conversion.num_calls == 1
    assert len(said) == 1
    assert DEFAULT_MODEL in said[0]


def test_others_may_read_what_was_converted(cache_dir: Path, conversion: FakeConversion) -> None:
    assert prepare_default(cache_dir, quietly, conversion).stat().st_mode & 0o777 == 0o755


def test_threads_at_once_convert_once(cache_dir: Path, conversion: FakeConversion) -> None:
    together = threading.Barrier(NUM_CALLERS)

    def prepare(_: int) -> list[str]:
        together.wait(10)
        return names(prepare_default(cache_dir, quietly, conversion))

    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        seen = list(pool.map(prepare, range(NUM_CALLERS)))
    assert seen == [["config.json", "model.safetensors"]] * NUM_CALLERS
    assert conversion.num_calls == 1


def test_processes_at_once_convert_once(cache_dir: Path, conversion: FakeConversion) -> None:
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    processes = [spawn.Process(target=_prepare, args=(together, cache_dir, conversion)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert conversion.num_calls == 1


def _prepare(together: threading.Barrier | None, cache_dir: Path, conversion: FakeConversion) -> None:
    if together:
        together.wait(20)
    assert names(prepare_default(cache_dir, quietly, conversion)) == ["config.json", "model.safetensors"]


def test_a_conversion_that_fails_leaves_nothing_and_is_tried_again(cache_dir: Path, conversion: FakeConversion) -> None:
    def fail(source: Path, target: Path) -> None:
        conversion(source, target)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare_default(cache_dir, quietly, fail)
    assert names(cache_dir / "models") == [f"{DEFAULT_MODEL}.lock"]
    prepare_default(cache_dir, quietly, conversion)
    assert conversion.num_calls == 2


def test_what_a_killed_conversion_left_is_removed(cache_dir: Path, conversion: FakeConversion) -> None:
    conversion.kills_its_process = True
    process = multiprocessing.get_context("spawn").Process(target=_prepare, args=(None, cache_dir, conversion))
    process.start()
    process.join(20)
    assert process.exitcode == 9
    conversion.kills_its_process = False
    assert any(name.startswith(".converting-") for name in names(cache_dir / "models"))
    prepare_default(cache_dir, quietly, conversion)
    assert names(cache_dir / "models") == [DEFAULT_MODEL, f"{DEFAULT_MODEL}.lock"]


def test_a_file_that_is_no_model_is_named_with_the_cause(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter's own last lines are what the user sees."""
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    with pytest.raises(ModelError, match=r"\.gguf could not be converted:\n.*"):
        prepare_default(cache_dir, quietly)
    assert names(cache_dir / "models") == [f"{DEFAULT_MODEL}.lock"]


def test_without_its_package_there_is_no_default_model(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_DEFAULT_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ModelError, match="no-such-distribution, which is not installed; run `make setup`"):
        resolve_model("", cache_dir)
    assert names(cache_dir / "models") == [f"{DEFAULT_MODEL}.lock"]
