import numpy as np
import pytest
import torch

from thimble_zarr.bits import (
    BFLOAT16_RECIPE,
    NATIVE_DTYPES,
    all_finite,
    decode,
    difference_dtype,
    encode,
    fill_value,
    is_nan,
    least_positive,
    ordered,
    spacing,
    storage_dtype,
    ulp_distance,
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


NEGATIVE = 2**15
MAGNITUDES = EVERY_PATTERN[:NEGATIVE]


def as_numbers(patterns: np.ndarray) -> np.ndarray:
    """What torch takes bfloat16 patterns for."""
    return torch.from_numpy(patterns).view(torch.bfloat16).double().numpy()


def is_finite(patterns: np.ndarray) -> np.ndarray:
    return np.isfinite(as_numbers(patterns))


def test_every_bfloat16_nan_is_one() -> None:
    np.testing.assert_array_equal(is_nan(EVERY_PATTERN), np.isnan(as_numbers(EVERY_PATTERN)))


@pytest.mark.parametrize("native", ["float16", "float32", "float64"])
def test_other_nans_are_nan_too(native: str) -> None:
    values = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, -np.nan], dtype=native)
    assert is_nan(values).tolist() == [False] * 5 + [True] * 2


def test_every_bfloat16_that_is_not_finite_is_seen_among_others() -> None:
    finite = np.isfinite(as_numbers(EVERY_PATTERN))
    assert all_finite(EVERY_PATTERN[finite].reshape(2, -1))
    for pattern in EVERY_PATTERN[~finite]:
        assert not all_finite(np.array([[0x8000, pattern], [0x3F80, 0xBF80]], np.uint16))


@pytest.mark.parametrize("native", ["float16", "float32", "float64"])
def test_other_numbers_that_are_not_finite_are_seen(native: str) -> None:
    most = np.finfo(native).max
    assert all_finite(np.array([0.0, -0.0, most, -most], native))
    for value in (np.nan, np.inf, -np.inf):
        assert not all_finite(np.array([0.0, value], native))


def test_every_bfloat16_number_has_its_place() -> None:
    """Sorted by torch's values, places rise by one from number to number; zeros share theirs."""
    numbers = EVERY_PATTERN[~np.isnan(as_numbers(EVERY_PATTERN))]
    values, places = np.unique(as_numbers(numbers), return_index=True)
    assert len(values) == 2 * (2**15 - 127) - 1
    found = ordered(numbers[places])
    np.testing.assert_array_equal(np.diff(found), 1)
    assert found[values == 0].tolist() == [0]
    assert ordered(np.array([0, NEGATIVE], dtype=np.uint16)).tolist() == [0, 0]


def test_every_bfloat16_spacing_is_the_way_to_the_next_number() -> None:
    finite = MAGNITUDES[is_finite(MAGNITUDES)]
    expected = as_numbers(finite + np.uint16(1)) - as_numbers(finite)
    expected[-1] = expected[-2]  # beyond the largest number lies infinity
    for sign in (0, NEGATIVE):
        np.testing.assert_array_equal(spacing(finite | np.uint16(sign), "bfloat16"), expected)
    assert np.isnan(spacing(np.array([0x7F80, 0xFF80, 0x7FC0], np.uint16), "bfloat16")).all()


@pytest.mark.parametrize("native", ["float16", "float32", "float64"])
def test_spacing_is_numpys(native: str) -> None:
    info = np.finfo(native)
    rng = np.random.default_rng(0)
    exponents = rng.uniform(info.minexp - info.nmant, info.maxexp - 1, 5000)
    values = np.exp2(exponents).astype(native) * rng.choice([-1, 1], 5000).astype(native)
    edges = [0.0, info.smallest_subnormal, info.smallest_normal, -info.smallest_normal, 1]
    values = np.concatenate([values, np.array(edges, dtype=native)])
    with np.errstate(under="ignore"):
        expected = np.spacing(np.abs(values)).astype(np.float64)
    np.testing.assert_array_equal(spacing(values, native), expected)
    assert np.isnan(spacing(np.array([np.inf, -np.inf, np.nan], native), native)).all()


def test_every_bfloat16_pattern_is_as_far_from_others_as_torch_can_step() -> None:
    """Distances along the lattice, counted by walking it."""
    values = as_numbers(EVERY_PATTERN)
    lattice = np.unique(values[~np.isnan(values)])
    place = np.searchsorted(lattice, values)
    for other in (0x0000, 0x8000, 0x3F80, 0xBF81, 0x0001, 0x7F80, 0xFF7F):
        others = np.full_like(EVERY_PATTERN, other)
        expected = np.abs(place - place[other]).astype(np.float64)
        expected[np.isnan(values)] = np.inf
        np.testing.assert_array_equal(ulp_distance(EVERY_PATTERN, others), expected)
        np.testing.assert_array_equal(ulp_distance(others, EVERY_PATTERN), expected)
    nan = np.full_like(EVERY_PATTERN, 0xFFC1)
    expected = np.where(np.isnan(values), 0.0, np.inf)
    np.testing.assert_array_equal(ulp_distance(EVERY_PATTERN, nan), expected)


@pytest.mark.parametrize("native", ["float16", "float32", "float64"])
def test_a_step_of_nextafter_is_one_ulp(native: str) -> None:
    dtype = getattr(torch, native)
    info = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 3.7, info.tiny, -info.tiny, info.max, -info.max, 1e-7], dtype=dtype
    )
    for towards in (np.inf, -np.inf):
        toward = np.full(len(values), towards, dtype=native)
        with np.errstate(over="ignore", under="ignore"):
            after = np.nextafter(values.numpy(), toward)
        np.testing.assert_array_equal(ulp_distance(values.numpy(), after), 1)
        np.testing.assert_array_equal(
            np.sign(ordered(after) - ordered(values.numpy())), np.sign(towards)
        )


def test_distances_across_zero_do_not_overflow() -> None:
    largest = np.array([np.inf])
    patterns_below = 0x7FF0_0000_0000_0000
    assert ulp_distance(largest, -largest).tolist() == [2.0 * patterns_below]
    assert ulp_distance(largest, np.array([0.0])).tolist() == [float(patterns_below)]


@pytest.mark.parametrize("native", NATIVE_DTYPES)
def test_the_least_positive_number_is_torchs(native: str) -> None:
    info = torch.finfo(getattr(torch, native))
    assert least_positive(native) == info.smallest_normal * info.eps
    assert float(torch.tensor(least_positive(native), dtype=getattr(torch, native))) > 0


@pytest.mark.parametrize("native", NATIVE_DTYPES)
def test_numbers_are_rounded_as_torch_does(native: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[::2] = (bits[::2] & 0xFFFF0000) | 0x8000  # halfway in bfloat16
    bits[1::4] = (bits[1::4] & 0xFFFFE000) | 0x1000  # and in float16
    bits[(bits & 0x7F800000) == 0x7F800000] |= 0x400000  # NaN, and none that is a signal
    values = np.append(bits.view(np.float32), [np.inf, -np.inf, -0.0]).astype(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, native)).double().numpy()
    for given in (values, values.astype(np.float64)):
        stored = encode(given, native)
        assert stored.dtype == storage_dtype(native)
        found = decode(stored, native, np.float64)
        np.testing.assert_array_equal(found, expected)
        there = ~np.isnan(found)
        np.testing.assert_array_equal(np.signbit(found)[there], np.signbit(expected)[there])


@pytest.mark.parametrize("beside", [0.0, 2.0**-52, -(2.0**-53)])
def test_float64_is_rounded_once(beside: float) -> None:
    """Just beside the middle of two numbers; torch rounds to float32 first, and then to even."""
    lattice = np.sort(as_numbers(EVERY_PATTERN[is_finite(EVERY_PATTERN)]))
    below, above = lattice[:-1], lattice[1:]
    middle = (below + above) / 2 * (1 + beside)
    magnitude_above = np.abs(above) > np.abs(below)
    far = np.where(magnitude_above, above, below)
    near = np.where(magnitude_above, below, above)
    is_even = encode(far, "bfloat16") % 2 == 0
    expected = np.where((is_even & (beside == 0)) | (beside > 0), far, near)
    np.testing.assert_array_equal(decode(encode(middle, "bfloat16"), "bfloat16"), expected)


@pytest.mark.parametrize("native", ["bfloat16", "float16", "float32"])
def test_every_difference_of_places_fits(native: str) -> None:
    infinite = encode(np.array([np.inf, -np.inf]), native)
    limits, ends = np.iinfo(difference_dtype(native)), ordered(infinite)
    assert limits.max >= int(ends[0]) - int(ends[1]) > np.iinfo(f"i{infinite.itemsize}").max


def test_differences_of_float64_fit_below_two() -> None:
    below = np.nextafter(2.0, 0)
    places = ordered(np.array([below, -below, 2.0, -2.0]))
    assert places[0] - places[1] == int(places[0]) - int(places[1])
    assert int(places[2]) - int(places[3]) > np.iinfo(np.int64).max


@pytest.mark.parametrize("native", NATIVE_DTYPES)
@pytest.mark.parametrize("of", NATIVE_DTYPES)
def test_spacing_of_another_dtype_is_of_its_numbers_around(native: str, of: str) -> None:
    """Around a number lie two of the other dtype, which torch finds by rounding towards it."""
    rng, info = np.random.default_rng(0), torch.finfo(getattr(torch, of))
    sizes = np.exp2(rng.uniform(-30, 20, 2000))
    stored = encode(np.concatenate([sizes * rng.choice([-1, 1], 2000), [0.0, 1.0]]), native)
    numbers = decode(stored, native, np.float64)
    digits = -int(np.log2(info.eps))
    exponents = np.frexp(np.maximum(np.abs(numbers), info.tiny))[1] - 1
    expected = np.where(np.abs(numbers) > info.max, np.nan, np.exp2(exponents - digits))
    np.testing.assert_array_equal(spacing(stored, native, of), expected)
