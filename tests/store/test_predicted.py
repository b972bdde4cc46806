"""A predicted store has the bits of a plain one, whatever was done to the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import stores
from tests.support.faults import Arrays, flip_bit, relabel, rewrite
from tests.support.runs import Loop, token_labels
from tests.support.zoo import Recorded, record_zoo
from thimble_zarr import Recorder, every
from thimble_zarr.bits import patterns
from thimble_zarr.errors import DamagedStoreError, StoreError, UnsupportedFormatError
from thimble_zarr.format.coding import PLAIN
from thimble_zarr.optim.programs import program as running_module
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.sources import recode as recode_module
from thimble_zarr.store.coding.predicted import Prediction
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.reader import StoreReader

N_STEPS = 9

MEMORY = 5_000
"""For each byte of an element: makes blocks of a few steps."""

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
SINGLE, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}

Hand = Callable[[Loop, int], object]


def nothing(loop: Loop, step: int) -> None:
    """Leave everything as it is."""


def no_gradient(loop: Loop, step: int) -> None:
    if step in (3, 7):
        loop.weight.grad = None


def not_finite(loop: Loop, step: int) -> None:
    if step in (2, 6):
        loop.weight.grad[3, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])


def clamp(loop: Loop, step: int) -> None:
    loop.weight.data.clamp_(-0.02, 0.02)


def average_copied_back(loop: Loop, step: int) -> None:
    before = getattr(loop, "average", loop.weight.data.clone())
    loop.average = torch.lerp(before, loop.weight.data, 0.25)
    if step % 4 == 0:
        loop.weight.data.copy_(loop.average)


def change_rate(loop: Loop, step: int) -> None:
    loop.optimizer.param_groups[0]["lr"] *= 0.83


def change_momentum(loop: Loop, step: int) -> None:
    """Below one half torch computes the first moment from its other end."""
    loop.optimizer.param_groups[0]["betas"] = (0.9 - step / 13, 0.99)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a shard, and a last one that is not full."""
    monkeypatch.setattr("thimble_zarr.format.layout.TARGET_CHUNK_BYTES", 75)


@dataclass(frozen=True)
class Case:
    """A run, and what somebody does before and after each step."""

    dtype: torch.dtype = torch.bfloat16
    optimizer: type[torch.optim.Optimizer] = ADAMW
    options: Mapping[str, object] = field(default_factory=lambda: SINGLE)
    before: Hand = nothing
    after: Hand = nothing
    recorded: Mapping[str, object] = field(default_factory=dict)
    is_predicted: bool = True

    def record(self, path: Path, coding: str) -> StoreReader:
        """Record it; return its store."""
        loop = Loop(dtype=self.dtype, optimizer=self.optimizer, **self.options)
        memory = MEMORY * self.dtype.itemsize
        options = {"labels": token_labels(), "memory_bytes": memory, **self.recorded}
        if "tokens" in options:
            options.pop("labels")
        with Recorder(
            path, loop.optimizer, parameter=loop.weight, coding=coding, **options
        ) as recorder:
            for step in range(1, N_STEPS + 1):
                loss = loop.backward()
                self.before(loop, step)
                loop.optimizer.step()
                recorder.log(loss=loss)
                self.after(loop, step)
                loop.optimizer.zero_grad()
        return StoreReader.open(path)


CASES = {
    "bfloat16 single": Case(),
    "bfloat16 foreach": Case(options=FOREACH),
    "bfloat16 fused": Case(options=FUSED),
    "float16": Case(torch.float16, options={**FOREACH, "eps": 1e-4}),
    "float16, epsilon of zero": Case(torch.float16, is_predicted=False),  # NaN of another kind
    "float32 fused": Case(torch.float32, options=FUSED),
    "float32": Case(torch.float32),
    "float64": Case(torch.float64, options=FUSED),
    "amsgrad": Case(options={**SINGLE, "amsgrad": True}),
    "maximize": Case(options={**FOREACH, "maximize": True}),
    "L2": Case(optimizer=ADAM, options={**FUSED, "weight_decay": 0.1}),
    "momentum": Case(optimizer=SGD, options={**SINGLE, "momentum": 0.9}),
    "nesterov": Case(
        torch.float32, SGD, {**FOREACH, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    ),
    "without states": Case(optimizer=SGD, recorded={"memory_bytes": 2_500}),
    "a program there is none for": Case(
        options={"lr": torch.tensor(1e-2), "foreach": False}, is_predicted=False
    ),
    "no gradient": Case(before=no_gradient),
    "gradients that are not finite": Case(before=not_finite),
    "not finite, in float32": Case(torch.float32, options=FUSED, before=not_finite),
    "clamped": Case(after=clamp, is_predicted=False),
    "average copied back": Case(after=average_copied_back, is_predicted=False),
    "learning rate": Case(after=change_rate),
    "momentum that changes": Case(after=change_momentum),
    "schedule": Case(recorded={"schedule": every(3)}, is_predicted=False),
    "some tokens": Case(recorded={"tokens": [10, 2, 7], "memory_bytes": 3_000}),
    "no labels": Case(recorded={"labels": None}),
    "W only": Case(recorded={"variables": ("W",), "memory_bytes": 2_500}, is_predicted=False),
    "W and gradient": Case(
        recorded={"variables": ("W", "grad"), "memory_bytes": 5_000}, is_predicted=False
    ),
}


def everything_in(reader: StoreReader) -> dict[str, object]:
    """Return all that a store says of a run, however it is written."""
    labels = reader.read_labels()
    found: dict[str, object] = {
        name: reader.read(name, (0, reader.n_rows)).tobytes() for name in reader.schema.dtypes
    }
    found |= {name: values.tobytes() for name, values in reader.read_scalars().items()}
    found |= {"step": reader.read_steps().tolist(), "ids": reader.read_token_ids().tolist()}
    for name in ("count", "live", "dead", "text"):
        label = getattr(labels, name)
        found[name] = None if label is None else [*label]
    return found


def assert_same(reader: StoreReader, other: StoreReader) -> None:
    one, two = everything_in(reader), everything_in(other)
    assert [name for name in one | two if one.get(name) != two.get(name)] == []
    for of in (reader, other):
        assert verify(of.path).findings == []
        assert list(of.integrity.altered_chunks((0, of.n_rows))) == []


def residual_bits(reader: StoreReader) -> int:
    """Return how many bits of the states are not as predicted."""
    found = 0
    for of in reader.schema.arrays.values():
        for row in (
            range(0, reader.n_rows, reader.schema.layout.block_steps) if of.is_sparse else ()
        ):
            with reader.arrays.block(of.name, row) as shard:
                for chunk in range(shard.n_chunks):
                    values = shard.decode(chunk)
                    assert shard.is_left_out(chunk) == (not values.any())
                    found += int(np.unpackbits(values.view(np.uint8)).sum())
    return found


@pytest.mark.filterwarnings("ignore:.*(no gradient|is nan):UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_decoded_bits_are_those_of_a_plain_recording(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain = case.record(tmp_path / "plain.zarr", "plain")
    predicted = case.record(tmp_path / "predicted.zarr", "predicted")
    assert_same(plain, predicted)
    layout = predicted.schema.layout
    if {*case.recorded} <= {"labels", "schedule"}:
        assert 4 <= layout.block_steps < N_STEPS
        assert layout.chunk_tokens < predicted.schema.n_tokens
    if case.is_predicted:  # but where torch takes elements one at a time, or its root from MKL
        n_states = predicted.n_rows * predicted.schema.row_bytes
        assert residual_bits(predicted) < 0.01 * 8 * n_states
    some = [10, 0, 3, 7] if predicted.schema.n_tokens > 10 else [1]
    for variable in predicted.schema.dtypes:
        for rows in ((2, 3), (3, predicted.n_rows)):
            rows = min(rows[0], predicted.n_rows - 1), min(rows[1], predicted.n_rows)
            part = predicted.read(variable, rows, np.array(some))
            np.testing.assert_array_equal(
                patterns(part), patterns(plain.read(variable, rows)[:, some])
            )


def test_parameters_of_every_rank_and_dtype(tmp_path: Path, zoo: Recorded) -> None:
    record_zoo(tmp_path / "run.zarr", ADAMW, coding="predicted")
    readers = StoreReader.open_each(tmp_path / "run.zarr")
    plain = StoreReader.open_each(zoo.path)
    for one, other in zip(plain, readers, strict=True):
        assert other.schema.coding.program is not None
        assert_same(one, other)
        assert residual_bits(other) < 0.03 * 8 * other.n_rows * other.schema.row_bytes


def test_steps_that_a_scaler_skips_are_no_residual(tmp_path: Path) -> None:
    readers = []
    for coding in ("plain", "predicted"):
        loop = Loop(fused=True)  # of which a step that is skipped is called all the same
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with Recorder(
            tmp_path / f"{coding}.zarr",
            loop.optimizer,
            parameter=loop.weight,
            memory_bytes=2 * MEMORY,
            coding=coding,
        ):
            for step in range(1, N_STEPS + 1):
                torch.manual_seed(step)
                loss = loop.head(loop.embedding(torch.randint(0, 7, (8,)))).float().pow(2).sum()
                scaler.scale(loss * (torch.inf if step in (2, 6) else 1.0)).backward()
                scaler.step(loop.optimizer)
                scaler.update()
                loop.optimizer.zero_grad()
        readers.append(StoreReader.open(tmp_path / f"{coding}.zarr"))
    assert_same(*readers)
    assert readers[1].n_rows == N_STEPS + 1
    assert readers[1].read_scalars()["optimizer_step"][-1] == N_STEPS - 2
    assert residual_bits(readers[1]) < 0.01 * 8 * readers[1].n_rows * readers[1].schema.row_bytes


def test_a_wrong_recorded_number_costs_disk_and_no_bit(tmp_path: Path) -> None:
    source = Case().record(tmp_path / "run.zarr", "predicted").path

    def change(bits: Arrays, scalars: Arrays) -> None:
        scalars["learning_rate"][5] *= 2
        flip_bit(bits["exp_avg"], (7, 3, 1), 4)

    rewrite(source, tmp_path / "wrong.zarr", change)
    wrong, right = StoreReader.open(tmp_path / "wrong.zarr"), StoreReader.open(source)
    assert residual_bits(wrong) > 0
    expected = everything_in(right)
    bits = right.read("exp_avg", (0, right.n_rows)).copy()
    flip_bit(bits, (7, 3, 1), 4)
    expected["exp_avg"] = bits.tobytes()
    rates = right.read_scalars()["learning_rate"].copy()
    rates[5] *= 2
    expected["learning_rate"] = rates.tobytes()
    assert everything_in(wrong) == expected


def test_a_run_without_a_program_is_predicted_to_stay_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Case().record(tmp_path / "plain.zarr", "plain")
    chooses = f"{recode_module.coding_of.__module__}.program_of"
    monkeypatch.setattr(chooses, lambda optimizer, dtypes: None)
    held = Case().record(tmp_path / "held.zarr", "predicted")
    assert held.schema.coding.program is None
    assert_same(plain, held)
    with held.arrays.block("W_residual", 4) as shard:
        left = shard.decode(0)[:, 2]
    rows = plain.read("W", (5, 7), plain.schema.stored_order[: len(left)])
    np.testing.assert_array_equal(left[: rows.shape[1]], rows[0] ^ rows[1])


def test_checksums_of_values_are_those_of_a_plain_store(tmp_path: Path) -> None:
    """Also of a block that is not full, and of tokens that fill up the last chunk."""
    with stores.coded("predicted"):
        stores.write_run(tmp_path / "predicted.zarr")
        plain = replace(stores.PREDICTED, coding=PLAIN)
        writer = stores.StoreWriter.create(tmp_path / "plain.zarr", plain, labels=token_labels())
        for n_rows in stores.COMMITS:
            stores.commit(writer, n_rows)
        writer.close()
    one, other = (
        StoreReader.open(tmp_path / f"{name}.zarr").chunk_checksums()
        for name in ("predicted", "plain")
    )
    for name in plain.dtypes:
        for row in range(0, stores.N_ROWS, stores.BLOCK_STEPS):
            np.testing.assert_array_equal(one.of_block(name, row), other.of_block(name, row))


# --- what is not as it was recorded --------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Case().record(tmp_path_factory.mktemp("predicted") / "run.zarr", "predicted").path


@pytest.mark.parametrize("constant", ["beta2", "eps", "minus_step_size"])
def test_a_program_that_computes_otherwise_is_refused(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    real = Adam.numbers

    def numbers(*arguments: object) -> dict[str, np.ndarray]:
        numbers = real(*arguments)
        return numbers | {constant: numbers[constant] * numbers[constant].dtype.type(1.25)}

    monkeypatch.setattr(Adam, "numbers", numbers)
    reader = StoreReader.open(recorded)
    changed = "exp_avg_sq" if constant == "beta2" else "W"
    with pytest.raises(DamagedStoreError, match=r"program adamw-single/1 computes something else"):
        reader.read(changed, (0, reader.n_rows))
    assert reader.read("grad", (0, 2)).size


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"coding": {"program": "adamw-single/2"}}, r"program adamw-single/2 of AdamW, and this"),
        ({"coding": {"program": "lion-single/1"}}, r"program lion-single/1 of AdamW, and this"),
        ({"optimizer": {"capturable": True}}, r"this release knows none; read it with a newer"),
        ({"format_version": 7}, r"it has format version 7, and this release reads version 6"),
        ({"format_version": 4}, r"it has format version 4, and this release reads version 6"),
    ],
)
def test_what_this_release_does_not_know_is_refused(
    recorded: Path, tmp_path: Path, schema: dict[str, object], message: str
) -> None:
    relabel(recorded, tmp_path / "run.zarr", **schema)
    with pytest.raises(UnsupportedFormatError, match=message):
        everything_in(StoreReader.open(tmp_path / "run.zarr"))


@pytest.mark.parametrize(
    "coding",
    [{"name": "delta"}, {"program": 1}, {"gradient_codec": "gzip"}],
)
def test_a_coding_that_no_release_writes_is_damage(
    recorded: Path, tmp_path: Path, coding: dict[str, object]
) -> None:
    relabel(recorded, tmp_path / "run.zarr", coding=coding)
    with pytest.raises(DamagedStoreError, match="its `thimble` attribute is malformed"):
        StoreReader.open(tmp_path / "run.zarr")


@pytest.mark.filterwarnings("ignore:.*is nan:UserWarning")
@pytest.mark.parametrize("native", ["bfloat16", "float16", "float32", "float64"])
def test_machine_code_and_numpy_decode_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    case = replace(Case(), dtype=getattr(torch, native), options=FUSED, before=not_finite)
    path = case.record(tmp_path / "run.zarr", "predicted").path
    assert running_module.is_available()
    compiled = everything_in(StoreReader.open(path))
    calls: list[int] = []
    real = running_module.NumpyEngine.run
    monkeypatch.setattr(running_module, "is_available", lambda: False)
    monkeypatch.setattr(
        running_module.NumpyEngine, "run", lambda *args: (calls.append(1), real(*args))
    )
    assert everything_in(StoreReader.open(path)) == compiled
    assert calls


def test_a_reader_that_was_opened_before_the_run_went_on_otherwise_has_no_number(
    tmp_path: Path,
) -> None:
    with stores.coded("predicted"):
        path = tmp_path / "run.zarr"
        writer = stores.create(path)
        stores.commit(writer, 4)
        stores.commit(writer, 7)
        writer.release()
        early, again = StoreReader.open(path), StoreReader.open(path)
        writer = stores.StoreWriter.resume(path, stores.SCHEMA, kept_rows=5)
        first_rows = again.read("W", (4, 5)).copy()
        bits, others = stores.block(1), stores.block(2)
        for name, rows in bits.items():
            rows[1:] = others[name][1:]
        writer.commit_block(4, 3, bits, stores.scalars(4))
        with pytest.raises(StoreError, match="was cut off and gone on with after it was opened"):
            early.read("W", (4, 7))
        writer.close()
        reader = StoreReader.open(path)
        np.testing.assert_array_equal(reader.read("W", (4, 7)), bits["W"][:3])
        np.testing.assert_array_equal(reader.read("W", (4, 5)), first_rows)


# --- any bits ------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32),
    n_rows=st.integers(1, 6),
    n_off=st.integers(0, 6),
    has_program=st.booleans(),
)
@settings(max_examples=40, derandomize=True)
def test_whatever_the_rows_are_they_are_restored(
    *, seed: int, n_rows: int, n_off: int, has_program: bool
) -> None:
    """Rows of any bits, of which some follow from the one before."""
    rng, schema = np.random.default_rng(seed), stores.PREDICTED
    with stores.coded("predicted"):
        numbers = stores.scalars(int(rng.integers(100)), n_rows)
    for values in numbers.values():
        values[rng.random(n_rows) < 0.1] = rng.choice([np.nan, np.inf, 0.0, -3.0])
    if not has_program:
        schema = replace(schema, coding=replace(schema.coding, program=None))
    steps = np.cumsum(rng.choice([1, 1, 1, 2], n_rows))
    prediction = Prediction.of(schema, numbers, steps)
    shape = n_rows, 3, 5
    rows = {
        name: rng.integers(0, 2**16, shape).astype(np.uint16) for name in schema.optimizer.variables
    }
    grads = rows.pop("grad")
    restored = {name: bits.copy() for name, bits in rows.items()}
    prediction.restore(restored, grads, {})
    for _ in range(n_off):  # all other rows follow
        row = int(rng.integers(n_rows))
        for name, bits in restored.items():
            bits[row] = rows[name][row]
    left = prediction.residuals(restored, grads)
    assert not any(of[0].any() for of in left.values())
    sparse = {name: of for name, of in left.items() if of.any()}
    again = {name: bits.copy() for name, bits in restored.items()}
    for bits in again.values():
        bits[1:] = 7
    prediction.restore(again, grads, sparse)
    for name, bits in again.items():
        np.testing.assert_array_equal(bits, restored[name])
