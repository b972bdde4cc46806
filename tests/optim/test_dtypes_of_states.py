"""States whose dtype is not that of the parameter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from thimble_zarr import Recorder, check, open_dataset
from thimble_zarr.bits import decode
from thimble_zarr.store.reader import StoreReader

LOWER = {
    "Adadelta": ("square_avg", "acc_delta"),
    "Adagrad": ("sum",),
    "RMSprop": ("square_avg",),
    "SGD": ("momentum_buffer",),
}
"""Optimizers of torch that take states of bfloat16 beside weights of float32."""


def record(path: Path, name: str, *, foreach: bool, replaced: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(11, 5, generator=generator))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)([weight], lr=0.1, foreach=foreach, **options)
    states = {of: torch.zeros(11, 5, dtype=torch.bfloat16) for of in LOWER[name]}
    optimizer.state[weight] |= states | ({} if name == "SGD" else {"step": torch.tensor(0.0)})
    with Recorder(path, optimizer, parameter=weight) as recorder:
        for step in range(1, 14):
            weight.grad = torch.randn(11, 5, generator=generator)
            optimizer.step()
            if step == replaced:
                recorder.flush()
                optimizer.state[weight] |= {of: held.float() for of, held in states.items()}
    return states[LOWER[name][0]]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", LOWER)
def test_they_are_recorded_and_replayed_as_they_are(
    name: str, foreach: bool, tmp_path: Path
) -> None:
    last = record(tmp_path / "run.zarr", name, foreach=foreach)
    reader = StoreReader.open(tmp_path / "run.zarr")
    state = LOWER[name][0]
    assert reader.schema.dtypes == {"W": "float32", "grad": "float32"} | dict.fromkeys(
        LOWER[name], "bfloat16"
    )
    stored = decode(reader.read(state, (13, 14))[0], "bfloat16", np.float32)
    np.testing.assert_array_equal(stored, last.float())
    result = check(tmp_path / "run.zarr")
    assert result.verdict.startswith("HOLDS to the bit"), result.verdict
    assert np.isfinite(open_dataset(tmp_path / "run.zarr")["update"][1:]).all()


def test_another_dtype_during_the_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="momentum_buffer became float32"):
        record(tmp_path / "run.zarr", "SGD", foreach=False, replaced=6)
