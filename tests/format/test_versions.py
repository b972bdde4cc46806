"""What this release and the one before wrote is read; anything older is refused in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thimble_zarr.errors import DamagedStoreError, UnsupportedFormatError
from thimble_zarr.format import versions
from thimble_zarr.format.coding import PLAIN, Coding
from thimble_zarr.format.schema import Schema


def written(version: int) -> dict[str, Any]:
    """Return the attribute of a store that a release of this format version left."""
    content: dict[str, Any] = json.loads(
        Path(__file__).with_name(f"attribute_{version}.json").read_text()
    )
    return content


def now(version: int) -> dict[str, Any]:
    """Return it as this release writes it: with the name of torch's function."""
    content = written(version)
    content["optimizer"]["function"] = "adam"
    return content


@pytest.mark.parametrize("version", [5, 6])
def test_what_a_version_wrote_is_read(version: int) -> None:
    schema = Schema.from_attribute(written(version))
    assert (schema.shape, schema.dims, schema.n_tokens) == ((11, 5), ("token", "dim"), 11)
    assert [*schema.dtypes] == ["W", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert schema.optimizer.name == "AdamW"
    np.testing.assert_array_equal(schema.stored_order, [0, 2, 5, 6, 7, 9, 10, 1, 3, 4, 8])


def test_version_5_has_plain_arrays() -> None:
    schema = Schema.from_attribute(written(5))
    assert schema.coding == PLAIN
    assert [*schema.arrays] == [*schema.dtypes]
    assert schema.to_attribute() == now(5) | {
        "format_version": 6,
        "coding": {"name": "plain", "program": None, "gradient_codec": "lz4"},
    }


def test_several_parameters_of_version_5_are_read() -> None:
    assert versions.upgrade({"format_version": 5, "parameters": ["a"]}) == {"parameters": ["a"]}


def test_version_6_says_how_arrays_are_coded() -> None:
    schema = Schema.from_attribute(written(6))
    assert schema.coding == Coding("predicted", "adamw-single/1", "lz4-bitshuffle")
    assert [*schema.arrays][:3] == ["W_keyframe", "W_residual", "grad"]


def test_what_is_written_is_what_was_read() -> None:
    assert Schema.from_attribute(written(6)).to_attribute() == now(6)
    assert Schema.from_attribute(now(6)).to_attribute() == now(6)


def test_version_6_without_a_coding_is_damage() -> None:
    attribute = written(6)
    del attribute["coding"]
    with pytest.raises(DamagedStoreError, match="malformed"):
        Schema.from_attribute(attribute)


def test_an_older_version_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    upgrades = {
        4: lambda content: {**content, "b": 1},
        5: lambda content: {**content, "b": content["b"] + 1},
    }
    with pytest.raises(UnsupportedFormatError, match="version 4, and this release reads"):
        versions.upgrade({"format_version": 4, "a": 0})
    monkeypatch.setattr(versions, "_UPGRADES", upgrades)
    assert versions.upgrade({"format_version": 4, "a": 0}) == {"a": 0, "b": 2}
    with pytest.raises(UnsupportedFormatError, match="version 3"):
        versions.upgrade({"format_version": 3})
