"""What decodes the chunks of predicted variables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import record
from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.store.coding.shard_codec import ShardFile
from thimble_zarr.store.reader import StoreReader


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_computes_with_numbers_as_this_machine_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """As where those on disk are of the other endianness."""
    record(tmp_path / "run.zarr", dtype=dtype, recorder_options={"coding": "predicted"})
    reader = StoreReader.open(tmp_path / "run.zarr")
    expected = reader.read("W", (0, reader.n_rows))
    real = ShardFile.decode

    def decode(shard: ShardFile, chunk: int, out: np.ndarray | None = None) -> np.ndarray:
        bits = real(shard, chunk)
        return bits.astype(bits.dtype.newbyteorder("S"))

    monkeypatch.setattr(ShardFile, "decode", decode)
    found = reader.read("W", (0, reader.n_rows))
    assert found.tobytes() == expected.tobytes()


def test_a_line_with_fewer_checksums_than_chunks_is_damage(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"coding": "predicted"})
    reader = StoreReader.open(tmp_path / "run.zarr")
    for key, of in {**reader.arrays.recorded}.items():
        if of.values is not None:
            reader.arrays.recorded[key] = replace(of, values=of.values[:0])
    with pytest.raises(DamagedStoreError, match="is not what was recorded"):
        reader.read("W", (0, reader.n_rows))
