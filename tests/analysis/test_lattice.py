"""Cells, spacings and displacements on any dtype's lattice, against arithmetic without bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from tests.support.faults import Arrays, rewrite
from tests.support.reads import Reads, axis_keys, no_computing
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS, record
from tests.support.summary_oracle import spacing_of
from thimble_zarr import Recorder, lattice, open_dataset, open_datasets, summary
from thimble_zarr.analysis.dataset.lazy import LazyArray
from thimble_zarr.bits import NATIVE_DTYPES, encode, ordered
from thimble_zarr.errors import ConfigError, SelectionError

DIGITS = {"bfloat16": (8, -126), "float16": (11, -14), "float32": (24, -126)}
"""Digits of a dtype's numbers, and its least exponent."""

N_PATTERNS = 2**16

every_pair = pytest.mark.parametrize(
    ("recorded", "dtype"),
    [(recorded, dtype) for recorded in ("bfloat16", "float16", "float32") for dtype in DIGITS],
)


def cells(values: np.ndarray, native: str) -> np.ndarray:
    """Count the numbers of a dtype from zero to each of `values`, which are some of them."""
    digits, least = DIGITS[native]
    fraction, exponent = np.frexp(np.abs(values))  # of `2 * fraction`, which is from 1 up to 2
    normal = (exponent - 1 - least) * 2.0 ** (digits - 1) + 2 * fraction * 2.0 ** (digits - 1)
    subnormal = np.abs(values) / 2.0 ** (least - digits + 1)
    below = np.abs(values) < 2.0**least
    counted = np.where(below, subnormal, np.where(np.isinf(values), np.nan, normal))
    return np.sign(values) * counted


def torch_rounds(values: np.ndarray, native: str) -> np.ndarray:
    """Round numbers of float32, or of fewer bits, as torch does."""
    assert (values.astype(np.float32) == values)[~np.isnan(values)].all()
    return torch.from_numpy(values).float().to(getattr(torch, native)).double().numpy()


def patterns_of(native: str, rng: np.random.Generator) -> np.ndarray:
    """Bits of every number of 16 bits; of float32 every exponent and sign, and all edges."""
    if native != "float32":
        return np.arange(N_PATTERNS, dtype=np.uint16)
    low = rng.integers(0, 2**16, N_PATTERNS, dtype=np.uint32)
    low[::3], low[1::3] = 0, 0xFFFF - rng.integers(0, 3, len(low[1::3]))
    low[2::9] = 0x8000 + rng.integers(0, 3, len(low[2::9])) - 1  # halfway in bfloat16
    return (np.arange(N_PATTERNS, dtype=np.uint32) << 16) | low


def up(bits: np.ndarray, native: str) -> np.ndarray:
    """Return the bits of torch's next number towards infinity."""
    numbers = torch.from_numpy(bits).view(getattr(torch, native))
    after = torch.nextafter(numbers, torch.full_like(numbers, torch.inf))
    return after.view(getattr(torch, bits.dtype.name)).numpy()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs in which every weight goes from any number to any other."""
    folder, found = tmp_path_factory.mktemp("lattices"), {}
    for native in DIGITS:
        weight = torch.nn.Parameter(torch.zeros(1024, 64, dtype=getattr(torch, native)))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        with Recorder(folder / native, optimizer, parameter=weight):
            for _ in range(3):
                weight.grad = torch.zeros_like(weight)
                optimizer.step()

        def jump(stored: Arrays, scalars: Arrays, native: str = native) -> None:
            rng, shape = np.random.default_rng(0), stored["W"].shape[1:]
            bits = patterns_of(native, rng)
            unsigned = stored["W"].view(bits.dtype)
            unsigned[0] = bits.reshape(shape)
            sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
            unsigned[1] = (bits ^ sign).reshape(shape)  # over zero
            unsigned[2] = up(unsigned[1], native)
            unsigned[3] = rng.permutation(bits).reshape(shape)

        rewrite(folder / native, folder / f"{native}.zarr", jump)
        found[native] = folder / f"{native}.zarr"
    return found


def weights(store: Path) -> np.ndarray:
    return open_dataset(store).W.values[:4].astype(np.float64)


@every_pair
def test_a_difference_of_cells_is_the_exact_number_of_cells(
    stores: dict[str, Path], recorded: str, dtype: str
) -> None:
    W = weights(stores[recorded])
    found = lattice(open_dataset(stores[recorded]), dtype).cell[:4]
    assert found.dtype == (np.int64 if dtype == "float32" else np.int32)
    expected = cells(torch_rounds(W, dtype), dtype)
    finite = np.isfinite(torch_rounds(W, dtype))
    np.testing.assert_array_equal(found.values[finite], expected[finite])
    both = finite[1:] & finite[:-1]
    moves = found.diff("step").values
    np.testing.assert_array_equal(moves[both], np.diff(expected, axis=0)[both])
    if recorded == dtype:
        assert (moves[1][W[1] < np.inf] == 1).all()  # to torch's next number
    largest = torch.tensor(torch.finfo(getattr(torch, dtype)).max)
    infinite = np.isinf(torch_rounds(W, dtype))
    beyond = int(cells(largest.double().numpy(), dtype)) + 1
    np.testing.assert_array_equal(found.values[infinite], np.sign(W[infinite]) * beyond)
    assert (np.abs(found.values[np.isnan(W)]) > beyond).all()


@every_pair
def test_spacing_and_displacement_are_real_numbers_of_the_dtype(
    stores: dict[str, Path], recorded: str, dtype: str
) -> None:
    W, ds = weights(stores[recorded]), lattice(open_dataset(stores[recorded]), dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        spaced = spacing_of(W, dtype)
        spaced[~(np.abs(W) <= torch.finfo(getattr(torch, dtype)).max)] = np.nan
        displacement = (np.diff(W, axis=0) / spaced[:-1]).astype(np.float32)
    np.testing.assert_array_equal(ds.ulp.values[:4], spaced.astype(np.float32))
    np.testing.assert_array_equal(ds.displacement_ulp.values[1:4], displacement)
    assert np.isnan(ds.displacement_ulp.values[0]).all()


@given(
    *[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2,
    st.sampled_from([*DIGITS]),
)
def test_cells_of_any_two_numbers(start: float, end: float, dtype: str) -> None:
    both = np.array([start, end], np.float32)
    rounded = torch_rounds(both, dtype)
    if np.isfinite(rounded).all():
        moved = np.diff(ordered(encode(both, dtype)))
        np.testing.assert_array_equal(moved, np.diff(cells(rounded, dtype)))


@pytest.fixture(scope="module")
def toy(toy_run: tuple[Path, object]) -> tuple[xr.Dataset, xr.Dataset]:
    ds = lattice(open_dataset(toy_run[0]), "float32")
    return ds, ds.compute()


def test_the_recorded_dtype_is_the_usual_one(toy_path: Path) -> None:
    ds = open_dataset(toy_path)
    own = lattice(ds)
    assert own.attrs == {"dtype": "bfloat16"}
    assert set(own.coords) == set(ds.coords)
    assert own.displacement_ulp.attrs["long_name"].endswith("of bfloat16 at W[t-1]")
    for name in ("ulp", "displacement_ulp"):
        np.testing.assert_array_equal(own[name].values, ds[name].values)
    moved = own.cell.diff("step").values != 0
    np.testing.assert_array_equal(moved, ds.moved.values[1:] == 1)
    finer = lattice(ds, "float64")
    assert finer.cell.dtype == np.int64
    np.testing.assert_array_equal(
        finer.cell.values, np.vectorize(float64_cell)(ds.W.values.astype(np.float64))
    )


def float64_cell(value: float) -> int:
    bits = int.from_bytes(np.float64(abs(value)).tobytes(), "little")
    return -bits if value < 0 else bits


@given(
    st.sampled_from(["cell", "ulp", "displacement_ulp"]),
    axis_keys(N_STEPS + 1),
    axis_keys(N_TOKENS),
    axis_keys(N_DIMS),
)
def test_any_selection_is_that_of_the_loaded_array(
    toy: tuple[xr.Dataset, xr.Dataset], name: str, step: object, token: object, dim: object
) -> None:
    ds, loaded = toy
    selected = ds[name].isel(step=step, token=token, dim=dim)
    expected = loaded[name].isel(step=step, token=token, dim=dim)
    assert type(selected.data) is LazyArray
    assert selected.dtype == expected.dtype == loaded[name].dtype
    np.testing.assert_array_equal(selected.values, expected.values)


def test_only_what_is_selected_is_read(toy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_computing():
        ds = lattice(open_dataset(toy_path), "float16").sel(token=[4, 9], step=slice(6, 6))
    reads = Reads(monkeypatch)
    ds.compute()
    assert {name for name, *_ in reads.calls} == {"W"}
    assert all(tokens == [4, 9] for *_, tokens in reads.calls)
    before = reads.elements
    lattice(open_dataset(toy_path).sel(token=4)).cell.compute()
    assert reads.elements - before == N_STEPS + 1


def test_a_scalar_and_a_vector_have_cells_too(tmp_path: Path) -> None:
    vector = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    scalar = torch.nn.Parameter(torch.tensor(0.3))
    optimizer = torch.optim.SGD([vector, scalar], lr=0.5)
    named = {"vector": vector, "scalar": scalar}
    with Recorder(tmp_path / "run.zarr", optimizer, parameters=named):
        for _ in range(3):
            vector.grad, scalar.grad = torch.ones(7), torch.tensor(1.0)
            optimizer.step()
    for name, shape in {"vector": (4, 7), "scalar": (4,)}.items():
        ds = lattice(open_dataset(tmp_path / "run.zarr", name), "bfloat16")
        expected = cells(
            torch_rounds(open_dataset(tmp_path / "run.zarr", name).W.values, "bfloat16"), "bfloat16"
        )
        assert ds.cell.shape == shape
        np.testing.assert_array_equal(ds.cell.values, expected)


@pytest.mark.parametrize("dtype", ["bf16", "int8", ""])
def test_other_dtypes_have_no_lattice(toy_path: Path, dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"must be one of {', '.join(NATIVE_DTYPES)}"):
        lattice(open_dataset(toy_path), dtype)


def test_it_needs_a_lazy_dataset_of_one_run(toy_path: Path) -> None:
    with pytest.raises(SelectionError, match="do not load"):
        lattice(open_dataset(toy_path).compute())
    runs = open_datasets([toy_path])
    with pytest.raises(SelectionError, match="of one run"):
        lattice(runs)
    assert lattice(runs.isel(run=0)).cell.dtype == np.int32


def test_a_run_that_is_shorter_than_others_has_no_cells_after_its_end(
    tmp_path: Path,
) -> None:
    record(tmp_path / "long.zarr", n_steps=7)
    record(tmp_path / "short.zarr", n_steps=5)
    ds = open_datasets([tmp_path / "long.zarr", tmp_path / "short.zarr"]).isel(run=1)
    found, alone = lattice(ds).cell, lattice(open_dataset(tmp_path / "short.zarr")).cell
    np.testing.assert_array_equal(found[:6], alone)
    np.testing.assert_array_equal(found[6:], ordered(encode(np.array([np.nan]), "bfloat16"))[0])
    assert summary(ds).step.values.tolist() == [0, 1, 2, 3, 4, 5]
