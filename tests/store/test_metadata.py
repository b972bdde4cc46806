"""Metadata are those that zarr-python makes, and no others are taken."""

import json
from pathlib import Path

import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata

from tests.support import stores
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import array_of
from thimble_zarr.store.metadata import Declared


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    stores.create(tmp_path / "run.zarr").release()
    return LocalFiles(tmp_path / "run.zarr")


def test_zarr_would_have_written_the_same_documents(files: LocalFiles) -> None:
    n_arrays = 0
    for key in files.list():
        if key.endswith("/zarr.json") and not key.startswith("."):
            written = files.get(key)
            metadata = ArrayV3Metadata.from_dict(json.loads(written))
            (content,) = metadata.to_buffer_dict(default_buffer_prototype()).values()
            assert content.to_bytes() == written
            assert Declared.of(json.loads(written)).shape == metadata.shape
            n_arrays += 1
    assert n_arrays > 10


def test_zarr_finds_every_array(files: LocalFiles) -> None:
    group = zarr.open_group(files.path, mode="r")
    assert {*dict(group.arrays())} == {array_of(key) for key in files.list() if "/zarr" in key} - {
        ".thimble"
    }
