"""A part of a run as a store of its own: the bits of the whole, and as checkable."""

from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from tests.support.commands import fails, succeeds
from tests.support.faults import flip_in_place
from tests.support.runs import History, record
from tests.support.zoo import Recorded
from thimble_zarr.sources.part import PART_OF
from thimble_zarr.store.reader import StoreReader

CODINGS = pytest.mark.parametrize("coding", ["plain", "predicted"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, History]]:
    """A run in each coding."""
    directory, found = tmp_path_factory.mktemp("whole"), {}
    for coding in ("plain", "predicted"):
        path = directory / f"{coding}.zarr"
        found[coding] = path, record(path, recorder_options={"coding": coding})
    return found


@CODINGS
@pytest.mark.parametrize(
    ("options", "rows", "n_checked"),
    [
        (("--tokens=dead",), range(14), 13),
        (("--steps=6:9",), range(5, 10), 4),
        (("--tokens=2,3,8", "--steps=:4"), range(5), 4),
        (("--tokens=all", "--steps=13"), range(12, 14), 1),
    ],
)
def test_a_part_has_the_bits_of_the_whole(
    runs: dict[str, tuple[Path, History]],
    tmp_path: Path,
    coding: str,
    options: tuple[str, ...],
    rows: range,
    n_checked: int,
) -> None:
    (whole_path, history), path = runs[coding], tmp_path / "part.zarr"
    succeeds("fetch", whole_path, path, *options)
    whole, part = thimble_zarr.open_dataset(whole_path), thimble_zarr.open_dataset(path)
    assert part.step.values.tolist() == [*rows]
    ids = part.token.values
    expected = {"--tokens=dead": whole.token.values[whole.dead], "--tokens=2,3,8": [2, 3, 8]}
    assert ids.tolist() == [*expected.get(options[0], range(11))]
    for name in history.tensors:
        np.testing.assert_array_equal(part[name], history[name][rows.start : rows.stop, ids])
    np.testing.assert_array_equal(part.loss, whole.loss[rows.start : rows.stop])
    assert part.text.values.tolist() == whole.text.values[ids].tolist()
    assert part.dead.values.tolist() == whole.dead.values[ids].tolist()
    schema = StoreReader.open(path).schema
    assert schema.coding.name == coding
    assert schema.attrs[PART_OF] == str(whole_path)
    assert thimble_zarr.verify(path).holds
    check = thimble_zarr.check(path, tokens="all")
    assert check.holds
    assert len(check.table) == n_checked


def test_a_part_of_a_wrong_run_is_as_wrong(toy_copy: Path, tmp_path: Path) -> None:
    flip_in_place(toy_copy, "W", (7, 3, 2), 0)
    succeeds("fetch", toy_copy, tmp_path / "wrong.zarr", "--tokens=3", "--steps=6:9")
    succeeds("fetch", toy_copy, tmp_path / "right.zarr", "--tokens=4,5", "--steps=6:9")
    assert not thimble_zarr.check(tmp_path / "wrong.zarr", tokens="all").holds
    assert thimble_zarr.check(tmp_path / "right.zarr", tokens="all").holds


def test_steps_of_several_parameters(zoo: Recorded, tmp_path: Path) -> None:
    succeeds("fetch", zoo.path, tmp_path / "part.zarr", "--steps=3:5")
    for whole, part in zip(
        StoreReader.open_each(zoo.path),
        StoreReader.open_each(tmp_path / "part.zarr"),
        strict=True,
    ):
        for name in whole.schema.dtypes:
            assert part.read(name, (0, 4)).tobytes() == whole.read(name, (2, 6)).tobytes()
    error = fails(2, "fetch", zoo.path, tmp_path / "other.zarr", "--tokens=all")
    assert "tokens can be chosen of one only" in error


def test_what_cannot_be_fetched_leaves_nothing(
    runs: dict[str, tuple[Path, History]], toy_copy: Path, tmp_path: Path
) -> None:
    whole, path = runs["plain"][0], tmp_path / "part.zarr"
    assert "not within the recorded steps" in fails(2, "fetch", whole, path, "--steps=6:99")
    assert "token 99 is not in this run" in fails(2, "fetch", whole, path, "--tokens=99")
    (toy_copy / "W" / "c.1.0.0").unlink()
    assert "W/c.1.0.0" in fails(3, "fetch", toy_copy, path, "--steps=3:9")
    assert not path.exists() or not [*path.rglob("zarr.json")]
    succeeds("fetch", whole, path, "--steps=3:4")
    assert "is there already" in fails(2, "fetch", whole, path, "--steps=3:4")
