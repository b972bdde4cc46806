"""What an earlier release wrote is read, or refused in words."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import stores
from tests.support.damage import edit, flip
from thimble_zarr.errors import UnsupportedFormatError
from thimble_zarr.format import versions
from thimble_zarr.format.schema import Schema
from thimble_zarr.store.integrity.repair import repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.ledger import seal, unseal
from thimble_zarr.store.writer import StoreWriter

WRITTEN = json.loads(Path(__file__).with_name("attribute_5.json").read_text())
"""The attribute of a store that the last release before this one left."""


def test_what_version_5_wrote_is_read() -> None:
    schema = Schema.from_attribute(WRITTEN)
    assert (schema.shape, schema.dims, schema.n_tokens) == ((11, 5), ("token", "dim"), 11)
    assert [*schema.dtypes] == ["W", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert schema.optimizer.name == "AdamW"
    np.testing.assert_array_equal(schema.stored_order, [0, 2, 5, 6, 7, 9, 10, 1, 3, 4, 8])


def test_what_is_written_is_what_was_read() -> None:
    """But for the version, and what that has more."""
    coding = {"name": "plain", "program": None, "gradient_codec": "lz4"}
    expected = WRITTEN | {"format_version": 6, "coding": coding}
    assert Schema.from_attribute(WRITTEN).to_attribute() == expected
    assert Schema.from_attribute(expected).to_attribute() == expected


def test_an_older_version_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    upgrades = {
        4: lambda content: {**content, "b": 1},
        5: lambda content: {**content, "b": content["b"] + 1},
    }
    with pytest.raises(UnsupportedFormatError, match="version 4, and this release reads version 6"):
        versions.upgrade({"format_version": 4, "a": 0})
    monkeypatch.setattr(versions, "_UPGRADES", upgrades)
    assert versions.upgrade({"format_version": 4, "a": 0}) == {"a": 0, "b": 2}
    with pytest.raises(UnsupportedFormatError, match="version 2"):
        versions.upgrade({"format_version": 2})


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
