"""A store of format version 5 is read, gone on with and repaired."""

import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support import stores
from tests.support.damage import edit, flip
from thimble_zarr.store.integrity.repair import repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.ledger import seal, unseal
from thimble_zarr.store.writer import StoreWriter


def is_of_version_5(group: dict[str, Any]) -> None:
    """Make the metadata of a root those of version 5."""
    attribute = group["attributes"]["thimble"]
    attribute["format_version"] = 5
    del attribute["coding"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A plain store as the release before this one left it."""
    path = tmp_path / "run.zarr"
    stores.write_run(path)
    edit(path / "zarr.json", is_of_version_5)
    ledger, lines = path / ".thimble/blocks.jsonl", []
    for line in ledger.read_bytes().splitlines():
        entry = unseal(line, dict)
        if "metadata" in entry:
            is_of_version_5(entry["metadata"]["zarr.json"])
        lines.append(seal(entry) + b"\n")
    content = b"".join(lines)
    ledger.write_bytes(content)
    commit = path / ".thimble/commit.json"
    covered = {"ledger_bytes": len(content), "ledger_crc32": zlib.crc32(content)}
    commit.write_bytes(seal(unseal(commit.read_bytes(), dict) | {"format_version": 5, **covered}))
    return path


def test_a_store_of_version_5_is_read_and_gone_on_with(store: Path) -> None:
    assert stores.check_rows(store) == stores.N_ROWS
    assert verify(store).findings == []
    assert repair(store).steps == []
    writer = StoreWriter.resume(store, stores.SCHEMA, kept_rows=6)
    assert stores.check_rows(store) == 6
    for n_rows in (8, 10):
        stores.commit(writer, n_rows)
    writer.close()
    assert stores.check_rows(store) == 10
    assert verify(store).findings == []


def test_a_store_of_version_5_is_repaired(store: Path) -> None:
    flip(store / "W/c.2.0.0")
    (store / "zarr.json").unlink()
    assert repair(store).n_rows == 8
    assert stores.check_rows(store) == 8
    assert verify(store).findings == []
