"""The recurrences against planted faults, and records that cannot be replayed exactly."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.faults import Arrays, flip_bit, flip_in_place, relabel, rewrite
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS, TINY_MEMORY, record
from thimble_zarr import Recorder, accounting, check, open_dataset
from thimble_zarr.analysis.compute.comparison import not_exact_because
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.bits import decode, spacing, unit_roundoff
from thimble_zarr.optim.formula import Precision
from thimble_zarr.optim.lanes import Lanes
from thimble_zarr.optim.replay import Program
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.store.reader import StoreReader

NATIVE = {"bfloat16": 1e-8, "float16": 1e-4, "float32": 1e-8, "float64": 1e-8}
"""Dtypes, each with an epsilon that does not underflow in it."""

STATES = ("W", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module", params=NATIVE)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run of each dtype, never to be written to."""
    path = tmp_path_factory.mktemp("sound") / "run.zarr"
    native = request.param
    dtype = getattr(torch, native)
    options = {"memory_bytes": TINY_MEMORY // 2 * dtype.itemsize}  # as many blocks of every dtype
    record(path, dtype=dtype, eps=NATIVE[native], weight_decay=0.1, recorder_options=options)
    return path


def changed(path: Path, target: Path, change: Callable[[Arrays, Arrays], None]) -> xr.Dataset:
    rewrite(path, target, change)
    return accounting(open_dataset(target))


def test_rewriting_changes_nothing_of_itself(sound: Path, tmp_path: Path) -> None:
    rewrite(sound, tmp_path / "copy.zarr", lambda bits, scalars: None)
    copied, original = open_dataset(tmp_path / "copy.zarr"), open_dataset(sound)
    xr.testing.assert_identical(copied.compute(), original.compute())


@pytest.mark.parametrize("name", STATES)
def test_every_flipped_bit_is_found(
    sound: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """In each element another bit, from the sign down. Each state meets each row."""
    turn = STATES.index(name) + [*NATIVE].index(request.node.callspec.params["sound"])
    row = (1, 6, N_STEPS)[turn % 3]
    rng = np.random.default_rng(row)
    places: list[tuple[int, int]] = []

    def flip_each_bit(bits: Arrays, scalars: Arrays) -> None:
        flipped = range(8 * bits[name].itemsize)[::-1]
        elements = rng.permutation(N_TOKENS * N_DIMS).tolist()
        for bit, element in zip(flipped, elements, strict=False):
            token, dim = divmod(element, N_DIMS)
            flip_bit(bits[name], (row, token, dim), bit)
            places.append((token, dim))

    table = changed(sound, tmp_path / "faulty.zarr", flip_each_bit)
    there = table.sel(step=row)
    others = [other for other in STATES if other != name]
    found = there.sel(recurrence=name)
    assert int(found.n_different) == int(found.n_beyond) == len(places)
    assert (int(found.first_token), int(found.first_dim)) == min(places)
    assert float(found.max_ulp) >= 1
    assert int(there.n_different.sel(recurrence=others).sum()) == 0
    assert int(table.n_different.sel(step=slice(1, row - 1)).sum()) == 0
    assert int(table.n_different.sel(step=slice(row + 2, None)).sum()) == 0
    found_text = verdict(table).text
    assert found_text.startswith(f"FAILS: from step {row} on, ")


@pytest.mark.parametrize("name", STATES)
def test_a_single_flipped_bit_is_found_and_placed(toy_copy: Path, name: str) -> None:
    for bit in range(16):
        token, dim, row = (3 * bit) % N_TOKENS, bit % N_DIMS, 1 + bit % N_STEPS
        flip_in_place(toy_copy, name, (row, token, dim), bit)
        found = accounting(open_dataset(toy_copy)).sel(recurrence=name)
        assert np.flatnonzero(found.n_different)[0] == row - 1
        at = found.sel(step=row)
        placed = [int(at[key]) for key in ("n_different", "first_token", "first_dim")]
        assert placed == [1, token, dim]
        assert (found.first_token.sel(step=slice(1, row - 1)) == -1).all()
        flip_in_place(toy_copy, name, (row, token, dim), bit)
    assert int(accounting(open_dataset(toy_copy)).n_different.sum()) == 0


def test_a_flip_outside_the_selection_is_not_seen(toy_path: Path, tmp_path: Path) -> None:
    rewrite(toy_path, tmp_path / "f.zarr", lambda bits, _: flip_bit(bits["W"], (5, 9, 2), 3))
    ds = open_dataset(tmp_path / "f.zarr")
    assert int(accounting(ds.isel(token=[8, 9])).n_different.sum()) > 0
    for elsewhere in ({"token": [0, 8, 10]}, {"dim": [0, 4]}, {"step": slice(7, None)}):
        assert int(accounting(ds.isel(**elsewhere)).n_different.sum()) == 0
    # Named as in the whole store, whatever is selected.
    table = accounting(ds.isel(token=[10, 9], dim=[4, 2])).sel(step=5, recurrence="W")
    assert (int(table.first_token), int(table.first_dim)) == (9, 2)


def test_the_sign_of_a_zero_is_a_bit_too(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    weight = torch.nn.Parameter(torch.ones(11, 5))
    optimizer = torch.optim.AdamW([weight])
    with Recorder(path, optimizer, parameter=weight):
        for _ in range(4):
            weight.grad = torch.zeros(11, 5)
            optimizer.step()
    table = changed(
        path, tmp_path / "f.zarr", lambda bits, _: flip_bit(bits["exp_avg_sq"], (4, 7, 3), 31)
    )
    assert int(table.n_different.sum()) == 1
    found = table.sel(step=4, recurrence="exp_avg_sq")
    assert (int(found.first_token), int(found.first_dim), float(found.max_ulp)) == (7, 3, 0.0)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_states_before_the_first_step_must_be_zero(
    toy_path: Path, tmp_path: Path, name: str
) -> None:
    table = changed(
        toy_path, tmp_path / "f.zarr", lambda bits, _: flip_bit(bits[name], (0, 4, 1), 0)
    )
    found = table.sel(step=1, recurrence=name)
    assert [int(found[key]) for key in ("n_different", "first_token", "first_dim")] == [1, 4, 1]
    assert not verdict(table).holds


def test_a_gradient_that_was_not_consumed_is_found(sound: Path, tmp_path: Path) -> None:
    def change(bits: Arrays, scalars: Arrays) -> None:
        sign = 8 * bits["grad"].itemsize - 1
        flip_bit(bits["grad"], (7, 10, 4), sign)

    table = changed(sound, tmp_path / "f.zarr", change)
    found = table.sel(step=7, recurrence="exp_avg")
    assert [int(found[key]) for key in ("n_different", "first_token", "first_dim")] == [1, 10, 4]
    assert int(table.n_different.sel(recurrence="exp_avg").sum()) == 1
    assert int(table.n_different.sel(recurrence="exp_avg_sq").sum()) == 0


OTHER_PROGRAMS = {
    "another torch": (
        {"software": {"torch": "2.0.0"}},
        "it was recorded with torch 2.0.0",
    ),
    "another device": ({"device": "cuda:3"}, "it was recorded on cuda:3"),
    "both": (
        {"software": {"torch": "2.0.0+cu118"}, "device": "cuda"},
        "it was recorded with torch 2.0.0+cu118 and it was recorded on cuda",
    ),
    "other instructions": (
        {"cpu_capability": "VSX"},
        "it was recorded on a CPU that torch used as VSX",
    ),
    "another order": ({"contiguous": False}, "its parameter was not contiguous"),
    "nobody knows": (
        {"software": {"torch": None}},
        "the record does not say which torch made it",
    ),
}
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="it would be replayed on the GPU")


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "run.zarr"
    record(path, dtype=getattr(torch, request.param), fused=True, weight_decay=0.1, n_steps=31)
    return path


def as_single(path: Path, target: Path, **schema: object) -> Path:
    relabel(path, target, optimizer={"implementation": "single"}, **schema)
    return target


@no_cuda
@pytest.mark.parametrize("why", OTHER_PROGRAMS)
def test_another_program_is_held_to_a_bound(fused: Path, tmp_path: Path, why: str) -> None:
    schema, reason = OTHER_PROGRAMS[why]
    ds = open_dataset(as_single(fused, tmp_path / "other.zarr", **schema))
    table = accounting(ds)
    assert table.attrs["not_exact_because"] == reason
    assert table.attrs["device"] == "cpu"
    assert int(table.n_different.sum()) > 0
    assert int(table.n_beyond.sum()) == 0
    found = verdict(table)
    assert found.holds
    ulps = float(table.max_ulp.max())
    assert 1 <= ulps < 1e6
    assert f"at most {ulps:.0f} ULP apart" in found.text
    assert found.text.endswith(f"because {reason}.")


@pytest.mark.parametrize(
    ("recorded", "here", "exact"),
    [
        ("AVX2", "AVX512", True),
        ("AVX512", "AVX2", True),
        ("AVX512", "AVX512", True),
        ("DEFAULT", "DEFAULT", True),
        ("AVX2", "DEFAULT", False),
        ("DEFAULT", "AVX512", False),
        (None, "DEFAULT", True),
    ],
)
def test_instructions_that_round_alike(
    toy_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: str | None,
    here: str,
    exact: bool,
) -> None:
    relabel(toy_path, tmp_path / "run.zarr", cpu_capability=recorded)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: here)
    source = Source(StoreReader.open(tmp_path / "run.zarr"))
    assert bool(not_exact_because(source)) != exact


def test_a_parameter_that_is_not_contiguous_is_known(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(5, 11).t())
    optimizer = torch.optim.AdamW([weight])
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    source = Source(StoreReader.open(tmp_path / "run.zarr"))
    assert not_exact_because(source) == "its parameter was not contiguous"


def test_another_program_of_the_same_torch_fails(fused: Path, tmp_path: Path) -> None:
    table = accounting(open_dataset(as_single(fused, tmp_path / "other.zarr")))
    assert table.attrs["not_exact_because"] == ""
    xr.testing.assert_equal(table.n_beyond, table.n_different.rename("n_beyond"))
    assert not verdict(table).holds


def external_change(bits: Arrays, scalars: Arrays) -> None:
    """In one element a value of another, a hundred times larger than rounding can make it."""
    bits["W"][9:, 3, 2] = bits["W"].dtype.type(0x3F80 if bits["W"].dtype == np.uint16 else 1.0)


def twice_the_learning_rate(bits: Arrays, scalars: Arrays) -> None:
    scalars["learning_rate"][9] *= 2


def another_beta(bits: Arrays, scalars: Arrays) -> None:
    scalars["beta1"][9] = 0.7


def a_gradient_of_the_step_before(bits: Arrays, scalars: Arrays) -> None:
    bits["grad"][9] = bits["grad"][8]


@no_cuda
@pytest.mark.parametrize(
    ("change", "recurrence"),
    [
        (external_change, "W"),
        (twice_the_learning_rate, "W"),
        (another_beta, "exp_avg"),
        (a_gradient_of_the_step_before, "exp_avg"),
    ],
)
def test_no_bound_hides_a_real_fault(
    fused: Path, tmp_path: Path, change: Callable[[Arrays, Arrays], None], recurrence: str
) -> None:
    rewrite(fused, tmp_path / "faulty.zarr", change)
    path = as_single(tmp_path / "faulty.zarr", tmp_path / "o.zarr", software={"torch": "2.0.0"})
    table = accounting(open_dataset(path))
    assert table.attrs["not_exact_because"]
    n_beyond = table.n_beyond.sel(recurrence=recurrence)
    assert int(n_beyond.sel(step=9)) > 0
    assert int(table.n_beyond.sel(step=slice(1, 8)).sum()) == 0
    assert verdict(table).text.startswith("FAILS: from step 9 on, ")


class Steps:
    """One step of many elements, drawn at random, by several programs."""

    N = 997

    def __init__(
        self, native: str, seed: int, *, decoupled: bool, amsgrad: bool, maximize: bool
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.native, self.amsgrad = native, amsgrad
        self.flags = {"decoupled_weight_decay": decoupled, "amsgrad": amsgrad, "maximize": maximize}
        self.count = float(self.rng.integers(1, 3000) if seed else 1)
        self.numbers = {
            "learning_rate": 10 ** self.rng.uniform(-4, -1),
            "beta1": self.rng.choice([0.0, 0.5, 0.9, 0.99]),
            "beta2": self.rng.choice([0.5, 0.95, 0.999]),
            "eps": max(NATIVE[native], 10 ** self.rng.uniform(-8, -3)),
            "weight_decay": self.rng.choice([0.0, 0.01, 0.3]),
            "optimizer_step": self.count,
        }
        self.before = {"W": self.draw(-4, 1), "exp_avg": self.draw(-5, 1)}
        self.before["exp_avg_sq"] = np.abs(self.draw(-6, 2))
        if amsgrad:
            self.before["max_exp_avg_sq"] = np.abs(self.draw(-6, 2))
        self.grad = self.draw(-5, 1)

    def draw(self, low: float, high: float) -> np.ndarray:
        """Numbers of the dtype, of all sizes, as float64."""
        values = 10 ** self.rng.uniform(low, high, self.N) * self.rng.choice([-1, 1], self.N)
        return decode(self.store(values, self.native), self.native, np.float64)

    @staticmethod
    def store(values: np.ndarray, native: str) -> np.ndarray:
        tensor = torch.from_numpy(values).to(getattr(torch, native))
        return (tensor.view(torch.uint16) if native == "bfloat16" else tensor).numpy()

    def run(self, implementation: str, native: str) -> dict[str, np.ndarray]:
        adam = Adam(name="Adam", implementation=implementation, **self.flags)
        inputs = self.before | {"grad": self.grad}
        program = Program(adam, dict.fromkeys(inputs, native), "cpu")
        after = program.step(
            {name: self.store(values, native) for name, values in inputs.items()},
            Lanes(self.N, self.N).split(np.arange(self.N)),
            {name: float(value) for name, value in self.numbers.items()},
        )
        return {name: decode(bits, native, np.float64) for name, bits in after.items()}

    def bounds(self) -> dict[str, np.ndarray]:
        native = self.native
        precision = Precision.of(native, scalars="float32", ours=unit_roundoff("float64"))
        numbers = {name: np.array(value) for name, value in self.numbers.items()}
        adam = Adam(name="Adam", implementation="single", **self.flags)
        return adam.bounds(self.before, self.grad, numbers, precision)


flags = pytest.mark.parametrize(
    "flags",
    [
        {"decoupled": decoupled, "amsgrad": amsgrad, "maximize": maximize}
        for decoupled in (True, False)
        for amsgrad in (True, False)
        for maximize in (True, False)
    ],
    ids=lambda flags: "-".join(name for name, is_set in flags.items() if is_set) or "plain",
)


@flags
@pytest.mark.parametrize("native", NATIVE)
def test_programs_stay_within_the_bound_of_each_other(native: str, flags: dict[str, bool]) -> None:
    for seed in range(8):
        steps = Steps(native, seed, **flags)
        single, fused = steps.run("single", native), steps.run("fused", native)
        reference = steps.run("single", "float64")
        for name, bound in steps.bounds().items():
            assert (bound >= 0).all()
            for one, other in ((single, fused), (single, reference), (fused, reference)):
                beyond = ~(np.abs(one[name] - other[name]) <= bound)
                assert not beyond.any(), (name, seed, steps.numbers, steps.count)


def spacing_of(values: np.ndarray, native: str) -> np.ndarray:
    """The spacing at numbers of a dtype, given as float64."""
    if native == "bfloat16":
        return spacing((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), native)
    return spacing(values.astype(native), native)


@flags
@pytest.mark.parametrize("native", NATIVE)
def test_the_bound_is_a_few_ulp_away_from_cancellation(native: str, flags: dict[str, bool]) -> None:
    """In float64 of float32: scalars may be computed in that."""
    in_ulp: dict[str, list[np.ndarray]] = {}
    for seed in range(1, 8):
        steps = Steps(native, seed, **flags)
        after = steps.run("single", native)
        for name, bound in steps.bounds().items():
            kept = np.abs(after[name]) >= 0.5 * np.abs(steps.before[name])
            ulp = spacing_of(after[name], "float32" if native == "float64" else native)
            in_ulp.setdefault(name, []).append((bound / ulp)[kept])
    for name, distances in in_ulp.items():
        assert np.median(np.concatenate(distances)) < 64, name


def test_bounds_are_of_each_row_in_whatever_order_rows_come(toy_path: Path, tmp_path: Path) -> None:
    """Where the replay is not exact, each variable's row before decides what may differ."""
    flipped, other = tmp_path / "flipped.zarr", tmp_path / "other.zarr"

    def flip(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        for row in (5, 8, 9):
            for name in ("W", "exp_avg", "exp_avg_sq"):
                flip_bit(bits[name], (row, 7, 3), 0)
                flip_bit(bits[name], (row, 8, 3), 7)

    rewrite(toy_path, flipped, flip)
    relabel(flipped, other, software={"torch": "0.1"})
    ds = open_dataset(other)
    expected = accounting(ds.isel(step=slice(4, 12)))
    assert expected.attrs["not_exact_because"]
    assert 0 < int(expected.n_beyond.sum()) < int(expected.n_different.sum())
    mixed = accounting(ds.isel(step=[11, 4, 8, 6, 5, 10, 9, 7]))
    xr.testing.assert_identical(mixed.sortby("step"), expected)


def test_what_differs_without_a_bound_is_not_judged_and_said(tmp_path: Path) -> None:
    """In float16 foreach RAdam overflows where gradients are large: rounding may do anything."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(11, 5, generator=generator).half())
    optimizer = torch.optim.RAdam([weight], lr=1e-2, eps=1e-4, foreach=True)
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        for _ in range(9):
            weight.grad = torch.randn(11, 5, generator=generator).half()
            weight.grad[7] *= 1000
            optimizer.step()

    def flip(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        for token in (3, 7):
            flip_bit(bits["W"], (9, token, 2), 0)

    rewrite(tmp_path / "run.zarr", tmp_path / "flipped.zarr", flip)
    relabel(tmp_path / "flipped.zarr", tmp_path / "other.zarr", software={"torch": "0.1"})
    (found,) = check(tmp_path / "other.zarr")
    assert found.holds
    assert found.is_partial
    assert found.replay is not None
    assert (found.replay["W"].not_judged, found.replay["exp_avg"].not_judged) == (1, 0)
    assert "HOLDS as far as it can be checked" in found.verdict.text
    assert "exp_avg_sq, but those that are not judged, follow from" in found.verdict.text
    assert "Not judged: 1 of W." in found.verdict.text
    assert found.to_json()["replay"]["W"]["not_judged"] == 1
    (whole,) = check(tmp_path / "run.zarr")
    assert not whole.is_partial

    def lose(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        bits["W"][9, 7, 2] = np.nan

    rewrite(tmp_path / "run.zarr", tmp_path / "lost.zarr", lose)
    relabel(tmp_path / "lost.zarr", tmp_path / "nan.zarr", software={"torch": "0.1"})
    (wrong,) = check(tmp_path / "nan.zarr")
    assert not wrong.holds
    assert wrong.replay is not None
    assert (wrong.replay["W"].equal, wrong.replay["W"].not_judged) == (494, 0)


def test_where_nothing_bounds_the_formula_it_judges_nothing_and_says_so(tmp_path: Path) -> None:
    """The squares of large gradients overflow in float16, and the formula's in no dtype."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(11, 5, generator=generator).half())
    optimizer = torch.optim.RMSprop([weight], lr=1e-2, eps=1e-4)
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        for step in range(9):
            weight.grad = torch.randn(11, 5, generator=generator).half()
            weight.grad[7] *= 4000 if step > 5 else 1
            optimizer.step()
    (found,) = check(tmp_path / "run.zarr", replay=False)
    unbounded = found.numbers["n_unbounded_rounding"]
    assert not unbounded[:6].any()
    assert 0 < (n_unbounded := unbounded.sum()) <= 15
    assert found.holds
    assert found.is_partial
    assert "HOLDS as far as it can be checked: all 495 weight changes, but" in found.verdict.text
    assert f"Not judged: {n_unbounded}. There rounding may overflow" in found.verdict.text
    (whole,) = check(tmp_path / "run.zarr", steps="1:6", replay=False)
    assert not whole.is_partial
