"""What decodes the chunks of predicted variables."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import record
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

    def decode(shard: ShardFile, chunk: int) -> np.ndarray:
        bits = real(shard, chunk)
        return bits.astype(bits.dtype.newbyteorder("S"))

    monkeypatch.setattr(ShardFile, "decode", decode)
    found = reader.read("W", (0, reader.n_rows))
    assert found.tobytes() == expected.tobytes()
