"""What is built from the sources has every component once, under kvrelay, and nothing beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kvrelay

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/kvrelay"
COMPONENTS = ("coordinator", "prefill_worker", "decode_worker", "kv_transfer", "client", "simulator")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from it, built from a copy: the sources stay as they are."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in ("src", *COMPONENTS):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def in_wheel(built: Path) -> list[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        return wheel.namelist()


def in_sources(*suffixes: str) -> set[str]:
    """Files below src/kvrelay, seen through the links, as the wheel names them."""
    folders = [PACKAGE, *(PACKAGE / component for component in COMPONENTS)]
    found = (path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)
    return {f"kvrelay/{path.relative_to(PACKAGE)}" for path in found}


@pytest.mark.parametrize("component", COMPONENTS)
def test_links_lead_to_the_folders(component: str) -> None:
    link = PACKAGE / component
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / component
    assert link.resolve() == ROOT / component
    assert (ROOT / component / "__init__.py").read_text() == "" or component == "client"


def test_the_wheel_has_each_module_and_stub_once(built: Path) -> None:
    names = in_wheel(built)
    assert len(names) == len(set(names))
    assert {name for name in names if name.endswith((".py", ".pyi"))} == in_sources(".py", ".pyi")
    for component in COMPONENTS:
        assert f"kvrelay/{component}/__init__.py" in names
    assert {"kvrelay/py.typed", "kvrelay/v1/worker_pb2.pyi", "kvrelay/etcd/rpc_pb2.pyi"} <= set(names)


def test_nothing_lies_beside_the_package(built: Path) -> None:
    top = {name.split("/")[0] for name in in_wheel(built)}
    assert top == {"kvrelay", f"kvrelay-{kvrelay.__version__}.dist-info"}


def test_the_wheel_has_the_command_and_the_license(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        info = f"kvrelay-{kvrelay.__version__}.dist-info"
        assert "kvrelay = kvrelay.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_the_sdist_has_files_in_place_of_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        assert all(member.isfile() or member.isdir() for member in sdist)
        names = {member.name.partition("/src/")[2] for member in sdist if member.isfile()}
    assert in_sources(".py", ".pyi") <= names
