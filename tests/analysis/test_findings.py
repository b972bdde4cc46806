"""Every cause planted in a sound record, and named; nothing named in a sound one."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from tests.support.faults import flip_bit, flip_in_place, rewrite
from tests.support.planted import CAST_BFLOAT16, CAST_FLOAT32, PLANTED, Planted
from tests.support.runs import TINY_MEMORY, Loop, record
from thimble_zarr import Recorder, accounting, open_dataset, tuning
from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.findings import find_causes
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.bits import storage_dtype
from thimble_zarr.causes.catalogue import CAUSES, NO_FAULTS, Finding
from thimble_zarr.format.schema import LABELS
from thimble_zarr.store.reader import StoreReader

N_STEPS, STEP = 40, 20

MEMORY = {"bfloat16": 400_000, "float32": 800_000}
"""Bounds that make the runs take a few blocks."""

RUNS = {"bfloat16": PLANTED | CAST_BFLOAT16, "float32": PLANTED | CAST_FLOAT32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("sound")
    for native in RUNS:
        record(
            directory / native,
            n_steps=N_STEPS,
            dtype=getattr(torch, native),
            n_tokens=101,
            n_dims=7,
            n_live=60,
            weight_decay=0.1,
            recorder_options={"memory_bytes": MEMORY[native]},
        )
    return {native: directory / native for native in RUNS}


def findings(store: Path) -> list[Finding]:
    ds = open_dataset(store)
    return find_causes(selected(ds), accounting(ds))


@pytest.mark.parametrize("native", RUNS)
def test_nothing_is_found_in_a_sound_record(runs: dict[str, Path], native: str) -> None:
    ds = open_dataset(runs[native])
    for part in (ds, ds.sel(token=ds.dead), ds.sel(step=slice(7, 9)), ds.isel(token=[3], dim=[2])):
        table = accounting(part)
        assert find_causes(selected(part), table) == []
        assert verdict(table).holds


@dataclass(frozen=True)
class Faulty:
    """A record with a planted cause, never to be written to, and where it was planted."""

    store: Path
    planted: Planted
    where: tuple[int | None, ...]


@pytest.fixture(scope="module")
def faulty(
    request: pytest.FixtureRequest, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Faulty:
    native, name = request.param
    planted, where = RUNS[native][name], []
    store = tmp_path_factory.mktemp("faulty") / "run.zarr"
    rewrite(
        runs[native],
        store,
        lambda bits, scalars: where.extend(
            planted.plant(bits, scalars, STEP, np.random.default_rng(0))
        ),
    )
    return Faulty(store, planted, tuple(where))


every_cause = pytest.mark.parametrize(
    "faulty", [(run, name) for run in RUNS for name in RUNS[run]], indirect=True, ids="-".join
)
each_kind = pytest.mark.parametrize(
    "faulty", [("bfloat16", name) for name in PLANTED], indirect=True, ids="-".join
)


@every_cause
def test_a_planted_cause_is_the_one_that_is_named(faulty: Faulty) -> None:
    ds = open_dataset(faulty.store)
    table = accounting(ds)
    (finding,) = find_causes(selected(ds), table)
    assert finding.code == faulty.planted.code
    for planted_at, found_at in zip(
        faulty.where, (finding.step, finding.token, finding.dim), strict=True
    ):
        assert planted_at is None or found_at == planted_at
    assert "{" not in finding.message
    assert not verdict(table).holds


@each_kind
def test_a_single_token_or_element_can_be_looked_into(faulty: Faulty) -> None:
    ds = open_dataset(faulty.store)
    known = {cause.code for cause in CAUSES}
    for part in (ds.isel(token=[85]), ds.isel(token=[85], dim=[3]), ds.sel(token=85)):
        assert {finding.code for finding in find_causes(selected(part), accounting(part))} <= known


def test_every_cause_is_planted() -> None:
    planted = {fault.code for faults in RUNS.values() for fault in faults.values()}
    assert {cause.code for cause in CAUSES} == planted | {"unbalanced"} | NO_FAULTS


def test_every_cause_has_a_code_of_its_own() -> None:
    codes = [cause.code for cause in CAUSES]
    assert len(set(codes)) == len(codes)
    assert all(cause.message for cause in CAUSES)


def test_what_nothing_explains_is_said_to_be_so(runs: dict[str, Path], tmp_path: Path) -> None:
    def plant(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        random = np.random.default_rng(0)
        for name in ("exp_avg", "exp_avg_sq", "W"):
            bits[name][10:30] = random.permuted(bits[name][10:30], axis=2)

    rewrite(runs["float32"], tmp_path / "run.zarr", plant)
    (finding,) = findings(tmp_path / "run.zarr")
    assert (finding.code, finding.step, finding.token) == ("unbalanced", 10, 0)


def test_two_causes_are_both_named(runs: dict[str, Path], tmp_path: Path) -> None:
    def plant(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        random = np.random.default_rng(0)
        PLANTED["bit of W"].plant(bits, scalars, 8, random)
        PLANTED["bit of exp_avg"].plant(bits, scalars, 12, random)
        PLANTED["three tokens changed by something else"].plant(bits, scalars, 25, random)

    rewrite(runs["bfloat16"], tmp_path / "run.zarr", plant)
    found = [(finding.code, finding.step) for finding in findings(tmp_path / "run.zarr")]
    assert found == [("bit-flip", 8), ("bit-flip", 12), ("external-change", 25)]


def test_a_gradient_that_flips_where_rounding_hides_it_is_found_by_its_checksum(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "run.zarr"
    shutil.copytree(runs["bfloat16"], store)
    hidden = 0
    for token in range(7):
        flip_in_place(store, "grad", (STEP, token, 4), 0)
        ds = open_dataset(store)
        table = accounting(ds)
        (finding,) = find_causes(selected(ds), table)
        place = (finding.code, finding.variable, finding.step, finding.token, finding.dim)
        assert place == ("bit-flip", "grad", STEP, token, 4)
        assert not verdict(table, [finding]).holds
        hidden += int(table.n_different.sum()) == 0
        flip_in_place(store, "grad", (STEP, token, 4), 0)
        assert find_causes(selected(ds), accounting(ds)) == []
    assert hidden  # else this shows nothing


@pytest.mark.parametrize("native", RUNS)
def test_any_bit_of_any_stored_element_is_found_and_located(
    runs: dict[str, Path], tmp_path: Path, native: str
) -> None:
    store = tmp_path / "run.zarr"
    shutil.copytree(runs[native], store)
    reader, random = StoreReader.open(store), np.random.default_rng(3)
    for _ in range(12):
        name = str(random.choice([*reader.schema.dtypes]))
        row, token, dim = (int(random.integers(n)) for n in (reader.n_rows, 101, 7))
        bit = int(random.integers(8 * storage_dtype(native).itemsize))
        flip_in_place(store, name, (row, token, dim), bit)
        found = [(f.code, f.variable, f.step, f.token, f.dim) for f in findings(store)]
        assert found == [("bit-flip", name, row, token, dim)]
        flip_in_place(store, name, (row, token, dim), bit)


def test_chunks_that_were_stored_anew_are_found_though_the_rows_follow(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """Another run in place of this one balances as well, but it is not what was committed."""
    store = tmp_path / "run.zarr"
    shutil.copytree(runs["bfloat16"], store)
    array = zarr.open_array(store, path="grad", mode="r+")
    array[0] = np.zeros((101, 7), np.uint16)  # that of the initial state, which nothing consumes
    (finding,) = findings(store)
    assert (finding.code, finding.variable, finding.step) == ("altered-chunk", "grad", 0)


def swap(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_swapped_blocks_are_both_named_first(runs: dict[str, Path], tmp_path: Path) -> None:
    store = Path(shutil.copytree(runs["bfloat16"], tmp_path / "run.zarr"))
    length = StoreReader.open(store).schema.layout.block_steps
    swap(store / "W/c.1.0.0", store / "W/c.2.0.0")
    first, *others = findings(store)
    assert (first.code, first.variable, first.step) == ("altered-chunk", "W", length)
    assert others
    assert (
        f"W was changed after it was recorded: W/c.1.0.0 (from step {length} on) is the file that "
        f"was recorded as W/c.2.0.0; W/c.2.0.0 (from step {2 * length} on) is the file that was "
        "recorded as W/c.1.0.0." in first.message
    )


def test_files_of_other_arrays_and_runs_are_told_apart(tmp_path: Path) -> None:
    store, other = tmp_path / "run.zarr", tmp_path / "other.zarr"
    for path, lr in ((store, 0.01), (other, 0.5)):
        size = {"n_tokens": 2000, "n_dims": 7, "n_live": 60, "n_steps": 20}
        record(path, lr=lr, recorder_options={"memory_bytes": 4_000_000}, **size)
    shutil.copy(other / "exp_avg/c.1.0.0", store / "exp_avg/c.1.0.0")
    shutil.copy(store / "exp_avg/c.0.0.0", store / "grad/c.1.0.0")
    shutil.copy(store / "beta1/c.0", store / "beta2/c.0")
    found = {one.variable: one for one in findings(store) if one.code == "altered-chunk"}
    assert "exp_avg/c.1.0.0 (from step 8 on) is not a file of this run" in found["exp_avg"].message
    assert "is the file that was recorded as exp_avg/c.0.0.0" in found["grad"].message
    assert "beta2/c.0 (from step 0 on) is the file that was recorded as beta1/c.0" in (
        found["beta2"].message
    )


def test_many_changed_files_are_counted(tmp_path: Path) -> None:
    """A block file from before more rows were added is called that of an earlier commit."""
    loop, store = Loop(dtype=torch.bfloat16), tmp_path / "run.zarr"
    with Recorder(
        store, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY
    ) as recorder:
        loop.step()
        recorder.flush()
        early = (store / "W/c.0.0.0").read_bytes()
        for _ in range(24):
            loop.step()
    blocks = sorted(store.glob("W/c.*"))
    assert len(blocks) == 7
    for file in blocks[1:]:
        file.write_bytes(blocks[0].read_bytes())
    blocks[0].write_bytes(early)
    first = findings(store)[0]
    assert "W/c.0.0.0 (from step 0 on) is the file of an earlier commit; W/c.1" in first.message
    assert "; and 3 more files." in first.message


def test_values_that_were_only_compressed_anew_are_no_finding(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "run.zarr"
    shutil.copytree(runs["bfloat16"], store)
    file = store / "W/c.0.0.0"
    before = file.read_bytes()
    array = zarr.open_array(store, path="W", mode="r+")
    array[:] = np.asarray(array[:])
    assert file.read_bytes() != before or len(before) > 0
    assert findings(store) == []


def test_a_selection_shows_what_lies_in_it(runs: dict[str, Path], tmp_path: Path) -> None:
    rewrite(
        runs["bfloat16"],
        tmp_path / "run.zarr",
        lambda bits, scalars: flip_bit(bits["W"], (STEP, 50, 3), 9),
    )
    ds = open_dataset(tmp_path / "run.zarr")
    for part, n in (
        (ds.sel(token=[49, 51]), 0),
        (ds.sel(token=[51, 50]), 1),
        (ds.sel(step=slice(1, STEP - 1)), 0),
        (ds.sel(step=slice(STEP + 1, None)), 1),
        (ds.isel(dim=[3]), 1),
        (ds.isel(dim=[2]), 0),
    ):
        found = find_causes(selected(part), accounting(part))
        assert [(f.step, f.token, f.dim) for f in found] == [(STEP, 50, 3)] * n


def test_a_live_fault_is_named_too(tmp_path: Path) -> None:
    """Not planted in the record but in the training: a hand on the weights between two steps."""
    loop = Loop(dtype=torch.float32)
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        for step in range(1, 12):
            loop.step()
            loop.optimizer.zero_grad()
            if step == 6:
                with torch.no_grad():
                    loop.weight[8, 1] += 0.125
    (finding,) = findings(tmp_path / "run.zarr")
    assert (finding.code, finding.step, finding.token, finding.dim) == ("external-change", 7, 8, 1)


def test_a_wide_parameter_is_sampled(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(tuning.TUNING, sample_elements=70)
    monkeypatch.setattr("thimble_zarr.tuning.TUNING", few)
    for name in (
        "bit of exp_avg_sq",
        "gradients one step late",
        "three tokens changed by something else",
    ):
        planted, store = PLANTED[name], tmp_path / name
        rewrite(
            runs["bfloat16"],
            store,
            lambda bits, scalars, planted=planted: planted.plant(
                bits, scalars, STEP, np.random.default_rng(5)
            ),
        )
        (finding,) = findings(store)
        assert finding.code == planted.code


def test_of_permuted_tokens_a_sample_has_some(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(tuning.TUNING, sample_elements=80 * 7)  # of 101 tokens
    monkeypatch.setattr("thimble_zarr.tuning.TUNING", few)
    planted, store = PLANTED["tokens of one row of W permuted"], tmp_path / "store"
    random = np.random.default_rng(5)
    rewrite(runs["bfloat16"], store, lambda bits, of: planted.plant(bits, of, STEP, random))
    (finding,) = findings(store)
    assert finding.code == planted.code


def test_with_a_cause_taken_out_it_is_not_found(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    without = tuple(cause for cause in CAUSES if cause.code != "shifted-rows")
    monkeypatch.setattr("thimble_zarr.causes.catalogue.CAUSES", without)
    planted = PLANTED["gradients one step late"]
    rewrite(
        runs["bfloat16"],
        tmp_path / "run.zarr",
        lambda bits, scalars: planted.plant(bits, scalars, STEP, np.random.default_rng(0)),
    )
    (finding,) = findings(tmp_path / "run.zarr")
    assert finding.code != "shifted-rows"


def test_a_store_that_is_being_written_is_not_taken_for_altered(tmp_path: Path) -> None:
    """A block that was committed short is committed again, under a reader that knew it short."""
    loop, store = Loop(dtype=torch.bfloat16), tmp_path / "run.zarr"
    with Recorder(store, loop.optimizer, parameter=loop.weight, n_steps=20) as recorder:
        for _ in range(5):
            loop.step()
            recorder.log(loss=1.0)
        recorder.flush()
        ds = open_dataset(store)
        table = accounting(ds)
        for _ in range(5):
            loop.step()
            recorder.log(loss=2.0)
        recorder.flush()
        assert find_causes(selected(ds), table) == []


@pytest.mark.parametrize("name", ["loss", "eps", "learning_rate", "dead", "count", "step"])
def test_scalars_and_labels_that_were_stored_anew_are_found(
    runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    store = tmp_path / "run.zarr"
    shutil.copytree(runs["float32"], store)
    array = zarr.open_array(store, path=name, mode="r+")
    values = np.asarray(array[:])
    array[7] = not values[7] if values.dtype == bool else values[7] * 2 + 1
    found = findings(store)
    assert found[0].code == "altered-chunk"
    assert found[0].variable == name
    from_step = "" if name in LABELS else " (from step 0 on)"
    assert f": {name}/c.0{from_step} has other values." in found[0].message


@pytest.mark.parametrize(("name", "value"), [("beta1", 1.0), ("optimizer_step", 0.0)])
def test_numbers_that_no_optimizer_can_take_fail_without_a_traceback(
    runs: dict[str, Path], tmp_path: Path, name: str, value: float
) -> None:
    def plant(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        scalars[name][1:] = value

    rewrite(runs["bfloat16"], tmp_path / "run.zarr", plant)
    ds = open_dataset(tmp_path / "run.zarr")
    table = accounting(ds)
    assert not verdict(table, find_causes(selected(ds), table)).holds


def test_a_wrong_number_at_one_step_is_not_called_shifted(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def plant(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        scalars["learning_rate"][7] *= 2

    rewrite(runs["float32"], tmp_path / "run.zarr", plant)
    (finding,) = findings(tmp_path / "run.zarr")
    assert (finding.code, finding.step) == ("other-learning-rate", 7)
    assert "learning rate 0.01," in finding.message


def test_moments_that_were_changed_are_no_wrong_gradient(tmp_path: Path) -> None:
    loop = Loop(dtype=torch.float32)
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        for step in range(1, 12):
            if step == 7:
                loop.optimizer.state[loop.weight]["exp_avg_sq"].mul_(0.5)
            loop.step()
            loop.optimizer.zero_grad()
    (finding,) = findings(tmp_path / "run.zarr")
    assert (finding.code, finding.step) == ("unbalanced", 7)


def test_many_places_are_counted_and_not_all_looked_into(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def plant(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        for row in range(1, N_STEPS + 1, 2):
            flip_bit(bits["grad"], (row, row, 3), 13)

    rewrite(runs["float32"], tmp_path / "run.zarr", plant)
    found = findings(tmp_path / "run.zarr")
    assert [finding.code for finding in found] == ["bit-flip"] * 16 + ["more-failures"]
    assert "in 4 more places, first at step 33" in found[-1].message


def test_what_was_altered_elsewhere_is_not_the_selections(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "run.zarr"
    shutil.copytree(runs["bfloat16"], store)
    flip_in_place(store, "grad", (STEP, 50, 4), 0)
    ds = open_dataset(store)
    for part, n in (
        (ds.sel(token=[49]), 0),
        (ds.sel(token=[50]), 1),
        (ds.sel(step=slice(STEP + 2, None)), 0),
        (ds.sel(step=slice(STEP, None)), 1),
    ):
        assert len(find_causes(selected(part), accounting(part))) == n
