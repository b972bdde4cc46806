"""What a coding says: which arrays have a variable, and which program predicts it."""

import dataclasses

import numpy as np
import pytest

from thimble_zarr.errors import ConfigError
from thimble_zarr.format.coding import PLAIN, Coding
from thimble_zarr.format.stored_array import arrays_of, coding_of
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.optim.specs.sgd import SGD

ADAMW = Adam(name="AdamW", implementation="single", decoupled_weight_decay=True)
BFLOAT16 = dict.fromkeys(ADAMW.variables, "bfloat16")


def test_plain_arrays_are_as_they_are() -> None:
    assert coding_of("plain", ADAMW, BFLOAT16) is PLAIN
    (array,) = arrays_of(PLAIN, "W", "bfloat16")
    assert (array.name, array.dtype, array.fill) == ("W", np.dtype("uint16"), 0x7FC0)
    assert not array.is_keyframe
    assert not array.is_sparse


@pytest.mark.parametrize(
    ("native", "stored", "bits"),
    [
        ("bfloat16", "uint16", "uint16"),
        ("float16", "float16", "uint16"),
        ("float32", "float32", "uint32"),
        ("float64", "float64", "uint64"),
    ],
)
def test_a_predicted_variable_has_keyframes_and_residual_bits(
    native: str, stored: str, bits: str
) -> None:
    keyframe, residual = arrays_of(Coding("predicted"), "exp_avg", native)
    assert (keyframe.name, keyframe.dtype) == ("exp_avg_keyframe", np.dtype(stored))
    assert keyframe.is_keyframe
    assert (residual.name, residual.dtype) == ("exp_avg_residual", np.dtype(bits))
    assert residual.is_sparse
    assert residual.fill == 0


def test_the_gradient_is_never_predicted() -> None:
    coding = coding_of("predicted", ADAMW, BFLOAT16)
    (array,) = arrays_of(coding, "grad", "bfloat16")
    assert (array.name, array.codec) == ("grad", "lz4-bitshuffle")
    archive = coding_of("predicted", ADAMW, BFLOAT16, archive=True)
    (array,) = arrays_of(archive, "grad", "bfloat16")
    assert array.codec == "pcodec"


def test_a_run_gets_its_program() -> None:
    assert coding_of("predicted", ADAMW, BFLOAT16).program == "adamw-single/1"
    sgd = SGD(name="SGD", implementation="foreach", has_momentum=True)
    dtypes = dict.fromkeys(sgd.variables, "float32")
    assert coding_of("predicted", sgd, dtypes).program == "sgd-foreach/1"


@pytest.mark.parametrize(
    ("optimizer", "dtypes"),
    [
        (ADAMW, {"W": "bfloat16", "grad": "bfloat16"}),
        (ADAMW, BFLOAT16 | {"W": "float32"}),
        (dataclasses.replace(ADAMW, capturable=True), BFLOAT16),
        (dataclasses.replace(ADAMW, lr_dtype="float32"), BFLOAT16),
    ],
    ids=["not every variable", "several dtypes", "capturable", "a tensor as learning rate"],
)
def test_nothing_predicts_what_no_program_computes(optimizer: Adam, dtypes: dict[str, str]) -> None:
    coding = coding_of("predicted", optimizer, dtypes)
    assert coding.is_predicted
    assert coding.program is None


def test_a_coding_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="'packed'; choose among plain, predicted"):
        coding_of("packed", ADAMW, BFLOAT16)  # type: ignore[arg-type]
