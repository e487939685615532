"""The file has no name and all its space, or it is not made and says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvrelay.kv_transfer.disk_file import ALIGNMENT_BYTES, CorruptBlockError, DiskFile

BLOCK = bytes(range(250)) * 20


def open_files(directory: Path) -> list[str]:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.lexists(link) and os.readlink(link).startswith(str(directory))]


def test_the_file_has_no_name_belongs_to_its_user_and_has_its_space(tmp_path: Path) -> None:
    file = DiskFile.create(tmp_path, 10 * ALIGNMENT_BYTES)
    assert list(tmp_path.iterdir()) == []
    (link,) = open_files(tmp_path)
    status = os.stat(link)
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= 10 * ALIGNMENT_BYTES
    file.close()
    file.close()
    assert open_files(tmp_path) == []


def test_a_block_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = DiskFile.create(tmp_path, 5 * ALIGNMENT_BYTES)
    file.configure(len(BLOCK))
    assert file.num_places == 2
    other = bytes(reversed(BLOCK))
    checksums = [file.write(place, memoryview(block)) for place, block in enumerate((BLOCK, other))]
    for place, block in enumerate((BLOCK, other)):
        into = bytearray(len(BLOCK))
        file.read(place, memoryview(into), checksums[place])
        assert into == block
    with pytest.raises(CorruptBlockError, match="place 0"):
        file.read(0, memoryview(bytearray(len(BLOCK))), checksums[1])
    with pytest.raises(IndexError, match="place 2 of 2"):
        file.write(2, memoryview(BLOCK))
    file.give_up_space()
    with pytest.raises(OSError, match="ends in place 0"):
        file.read(0, memoryview(bytearray(len(BLOCK))), checksums[0])
    file.close()


def test_a_disk_that_is_too_small_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} has \d+ bytes free, {1 << 60} are wanted"):
        DiskFile.create(tmp_path, 1 << 60)
    assert open_files(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fallocate(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(ValueError, match=rf"{tmp_path} has \d+ bytes free, 4096 are wanted"):
        DiskFile.create(tmp_path, 4096)
    assert open_files(tmp_path) == []


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file"), ("file", "not a folder")])
def test_a_wrong_folder_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path / name} cannot hold KV blocks: .*{reason}"):
        DiskFile.create(tmp_path / name, 4096)


def test_a_file_too_small_for_one_block_says_so(tmp_path: Path) -> None:
    file = DiskFile.create(tmp_path, 4096)
    with pytest.raises(ValueError, match="4096 bytes on disk cannot hold one KV block of 5000 bytes"):
        file.configure(5000)
    file.close()
