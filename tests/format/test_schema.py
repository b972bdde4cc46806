import dataclasses
import json

import numpy as np
import pytest

from tests.support.stores import OPTIMIZER, SCHEMA
from thimble_zarr.errors import ConfigError, DamagedStoreError, UnsupportedFormatError
from thimble_zarr.format.schema import (
    FORMAT_VERSION,
    Schema,
    TokenLabels,
)


def test_a_schema_survives_json() -> None:
    assert Schema.from_attribute(json.loads(json.dumps(SCHEMA.to_attribute()))) == SCHEMA


def test_row_bytes_follow_the_stored_dtypes() -> None:
    assert SCHEMA.row_bytes == 11 * 5 * (2 + 4)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1])
def test_another_version_is_refused_before_anything_is_read(version: int) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"format version {version}"):
        Schema.from_attribute({"format_version": version, "unknown": 1})


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Schema)][:5])
def test_a_missing_part_is_damage(key: str) -> None:
    attribute = SCHEMA.to_attribute()
    del attribute[key]
    with pytest.raises(DamagedStoreError, match="malformed"):
        Schema.from_attribute(attribute)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": "many"},
        {"dims": ["x", "y"]},
        {"layout": 3},
        {"optimizer": {"name": 1}},
        {"dtypes": {"W": "int8"}},
    ],
)
def test_a_wrong_part_is_damage(changed: dict[str, object]) -> None:
    with pytest.raises(DamagedStoreError):
        Schema.from_attribute(SCHEMA.to_attribute() | changed)


@pytest.mark.parametrize("value", [None, 3, {}, {"format_version": "1"}])
def test_what_is_no_schema_is_damage(value: object) -> None:
    with pytest.raises(DamagedStoreError, match="format version"):
        Schema.from_attribute(value)


def test_amsgrad_has_one_variable_more() -> None:
    amsgrad = dataclasses.replace(OPTIMIZER, amsgrad=True)
    assert set(amsgrad.variables) - set(OPTIMIZER.variables) == {"max_exp_avg_sq"}


def test_live_and_dead_follow_from_counts() -> None:
    labels = TokenLabels.from_counts(np.array([2, 0, 1]))
    assert labels.live.tolist() == [True, False, True]
    assert labels.dead.tolist() == [False, True, False]


def test_labels_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 tokens, but 2 values of `text`"):
        TokenLabels(text=["a", "b"]).check_length(3)
