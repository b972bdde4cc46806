"""What an earlier release wrote is read, or refused in words."""

import json
from pathlib import Path

import numpy as np
import pytest

from thimble_zarr.errors import UnsupportedFormatError
from thimble_zarr.format import versions
from thimble_zarr.format.schema import Schema

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
