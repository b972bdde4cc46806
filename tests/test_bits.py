import numpy as np
import pytest
import torch

from thimble_zarr.format.bits import (
    BFLOAT16_RECIPE,
    NATIVE_DTYPES,
    decode,
    fill_value,
    storage_dtype,
    unit_roundoff,
)

EVERY_PATTERN = np.arange(2**16, dtype=np.uint16)


def test_every_bfloat16_pattern_decodes_as_torch_does() -> None:
    expected = torch.from_numpy(EVERY_PATTERN).view(torch.bfloat16).float().numpy()
    decoded = decode(EVERY_PATTERN, "bfloat16")
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


def test_the_published_recipe_decodes() -> None:
    recipe = BFLOAT16_RECIPE.split("values = ")[1]
    values = eval(recipe, {"bits": EVERY_PATTERN})
    np.testing.assert_array_equal(values, decode(EVERY_PATTERN, "bfloat16"))


@pytest.mark.parametrize("native", NATIVE_DTYPES)
def test_values_survive_storage(native: str) -> None:
    tensor = torch.randn(1000).to(getattr(torch, native))
    stored = tensor.view(torch.uint16) if native == "bfloat16" else tensor
    assert stored.numpy().dtype == storage_dtype(native)
    decoded = decode(stored.numpy(), native, np.float64)
    np.testing.assert_array_equal(decoded, tensor.double().numpy())


@pytest.mark.parametrize("native", NATIVE_DTYPES)
def test_missing_is_nan(native: str) -> None:
    missing = np.full(3, fill_value(native)).astype(storage_dtype(native))
    assert np.isnan(decode(missing, native)).all()


@pytest.mark.parametrize("native", NATIVE_DTYPES)
def test_unit_roundoff_is_torchs(native: str) -> None:
    assert unit_roundoff(native) == torch.finfo(getattr(torch, native)).eps / 2


def test_nothing_is_copied_when_nothing_changes() -> None:
    values = np.ones(3, dtype=np.float32)
    assert decode(values, "float32") is values
