"""Stores that cannot be read."""

import json
from pathlib import Path

import pytest

from tests.support.commands import checked, fails


@pytest.mark.parametrize("command", ["check", "info"])
def test_a_path_that_is_no_store_is_unreadable(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("no store")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    (tmp_path / "directory").mkdir()
    for store in (tmp_path, tmp_path / "file", tmp_path / "directory"):
        assert f"{store} is not a thimble-zarr store" in fails(3, command, store)
    for store in (tmp_path / "nothing", tmp_path / "file" / "below"):
        assert str(store) in fails(3, command, store)


@pytest.mark.parametrize("command", ["check", "info"])
def test_a_store_of_a_newer_format_is_unreadable(toy_copy: Path, command: str) -> None:
    metadata = json.loads((toy_copy / "zarr.json").read_text())
    metadata["attributes"]["thimble"]["format_version"] = 99
    metadata["attributes"]["thimble"]["new_in_99"] = True
    (toy_copy / "zarr.json").write_text(json.dumps(metadata))
    message = fails(3, command, toy_copy)
    assert "format version 99" in message
    assert str(toy_copy) in message


def test_a_store_whose_chunk_is_gone_empty_or_flipped_is_unreadable(toy_copy: Path) -> None:
    chunk = toy_copy / "exp_avg" / "c.1.0.0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 3] ^= 1
    for damage in (
        lambda: chunk.write_bytes(content),
        lambda: chunk.write_bytes(b""),
        chunk.unlink,
    ):
        damage()
        message = fails(3, "check", toy_copy)
        assert "exp_avg" in message
        assert "thimble-zarr verify" in message or "restore it from a copy" in message
        assert checked(toy_copy, "--steps", "1:2")["holds"] is True


def test_a_store_without_its_commit_record_is_unreadable(toy_copy: Path) -> None:
    (toy_copy / ".thimble" / "commit.json").unlink()
    for command in ("check", "info"):
        assert "commit record" in fails(3, command, toy_copy)
