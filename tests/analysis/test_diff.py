"""Two runs against each other: planted divergences are found at their step, by their name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thimble_zarr
from tests.support.faults import flip_bit, flip_in_place, relabel, rewrite
from tests.support.notebook_file import notebook_tensors, save
from tests.support.runs import N_STEPS, TINY_MEMORY, History, Loop, token_labels
from tests.support.stores import OPTIMIZER
from tests.support.zoo import Recorded
from thimble_zarr import Recorder, diff, every
from thimble_zarr.analysis.diff.diff import DiffResult
from thimble_zarr.bits import decode, encode
from thimble_zarr.errors import ConfigError, DamagedStoreError, SelectionError
from thimble_zarr.format.layout import Layout
from thimble_zarr.format.schema import Schema, packed_mask
from thimble_zarr.store.coding.shard_codec import ShardFile, values_checksum
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter
from thimble_zarr.tuning import TUNING

Act = Callable[[Loop, int], object]


def train(path: Path, act: Act | None = None, *, n_steps: int = N_STEPS, **options: object) -> Path:
    """Record a toy run in which `act` does something before each step."""
    mine = {"memory_bytes", "tokens", "schedule", "variables", "attrs", "resume", "loop", "first"}
    given = {name: options.pop(name) for name in (mine | {"labels"}) & {*options}}
    loop = given.pop("loop", None) or Loop(**options)
    first = given.pop("first", 1)
    given = {"labels": token_labels(), "memory_bytes": TINY_MEMORY, **given}
    with Recorder(path, loop.optimizer, parameter=loop.weight, **given) as recorder:
        for step in range(first, n_steps + 1):
            if act is not None:
                act(loop, step)
            recorder.log(loss=loop.step())
            loop.optimizer.zero_grad()
    return path


def write_store(
    path: Path,
    schema: Schema,
    bits: dict[str, np.ndarray],
    scalars: dict[str, np.ndarray],
    *,
    steps: np.ndarray | None = None,
    token_ids: np.ndarray | None = None,
) -> Path:
    """Write a store of given bits, without labels."""
    n_rows, length = len(bits["W"]), schema.layout.block_steps
    ids = {} if token_ids is None else {"": token_ids}
    writer = StoreWriter.create(path, schema, n_rows=n_rows, token_ids=ids)

    def block(values: np.ndarray, start: int) -> np.ndarray:
        rows = np.zeros((length, *values.shape[1:]), values.dtype)
        there = values[start : start + length]
        rows[: len(there)] = there
        return rows

    for start in range(0, n_rows, length):
        writer.commit_block(
            start,
            min(length, n_rows - start),
            {name: block(values, start) for name, values in bits.items()},
            {name: block(values, start) for name, values in scalars.items()},
            steps=None if steps is None else steps[start : start + length],
        )
    writer.close()
    return path


def at(step: int, change: Callable[[Loop], object]) -> Act:
    return lambda loop, now: change(loop) if now == step else None


def other_batch(loop: Loop) -> None:
    torch.randint(0, 3, (3,))  # who draws once more draws other batches from here on


def lose_moments(loop: Loop) -> None:
    for state in loop.optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def flip(loop: Loop, token: int = 3, dim: int = 2, bit: int = 4) -> None:
    weight = loop.weight.data
    weight.view(torch.uint16 if weight.element_size() == 2 else torch.int32)[token, dim] ^= 1 << bit


def halve_rate(loop: Loop) -> None:
    for group in loop.optimizer.param_groups:
        group["lr"] /= 2


def reseed(loop: Loop, step: int) -> None:
    if step == 1:
        torch.manual_seed(1)


class OtherSeed(Loop):
    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        torch.manual_seed(1)
        nn.init.normal_(self.embedding.weight, std=0.02)


class SkippingLoop(Loop):
    """Has no gradient at step 4."""

    n = 0

    def backward(self) -> torch.Tensor:
        self.n += 1
        loss = super().backward()
        if self.n == 4:
            self.embedding.weight.grad = None
        return loss


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> Path:
    """A run that others depart from, never to be written to."""
    return train(tmp_path_factory.mktemp("whole") / "run.zarr", dtype=dtype)


def found(result: DiffResult) -> tuple[str, int, str]:
    assert result.cause is not None
    assert result.first is not None
    assert (result.first.step, result.first.variable) == (result.cause.step, result.cause.variable)
    return result.cause.code, result.cause.step, result.cause.variable


# --- what came first -----------------------------------------------------------------------------

PLANTED: dict[str, tuple[dict[str, object], tuple[str, int, str]]] = {
    "data order": ({"act": at(5, other_batch)}, ("data", 5, "grad")),
    "resumed without moments": ({"act": at(7, lose_moments)}, ("resume", 7, "exp_avg")),
    "one bit of W": ({"act": at(9, flip)}, ("changed-without-step", 9, "W")),
    "another weight decay": ({"weight_decay": 0.3}, ("configuration", 1, "weight_decay")),
    "another flag": ({"maximize": True}, ("configuration", 1, "exp_avg")),
    "another seed": ({"kind": OtherSeed}, ("initial-weights", 0, "W")),
    "another rate from step 6 on": ({"act": at(6, halve_rate)}, ("schedule", 6, "learning_rate")),
    "a step without a gradient": ({"kind": SkippingLoop}, ("skipped-step", 4, "optimizer_step")),
}


@pytest.mark.filterwarnings("default:no gradient at step 4")
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_divergence_is_found_at_its_step_by_its_name(
    name: str, whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    options, expected = PLANTED[name]
    options = dict(options)
    act, kind = options.pop("act", None), options.pop("kind", Loop)
    other = train(tmp_path / "b.zarr", act, loop=kind(dtype=dtype, **options))
    result = diff(whole, other)
    assert not result.is_equal
    assert found(result) == expected
    assert found(diff(other, whole)) == expected
    assert found(diff(whole, other, values=True)) == expected


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_a_gradient_that_is_no_number_is_data(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The run diverges at that step, and its rows follow none the less."""

    def diverge(loop: Loop) -> None:
        loop.head.weight.data[0, 0] = torch.nan

    other = train(tmp_path / "b.zarr", at(5, diverge), loop=Loop(dtype=dtype))
    assert found(diff(whole, other)) == ("data", 5, "grad")


@pytest.mark.parametrize(
    ("name", "bit"),
    [("W", 0), ("W", 5), ("W", 14), ("exp_avg", 0), ("exp_avg", 9), ("grad", 6), ("grad", 14)],
)
def test_one_bit_that_only_the_record_has_is_no_kernel(
    whole: Path, tmp_path: Path, name: str, bit: int
) -> None:
    place = (8, 6, 1)
    rewrite(whole, tmp_path / "b.zarr", lambda bits, _: flip_bit(bits[name], place, bit))
    result = diff(whole, tmp_path / "b.zarr")
    assert found(result) == ("changed-without-step", 8, name)
    first = result.first
    assert (first.token, first.dim, first.n_different, first.n_elements) == (6, 1, 1, 55)
    assert f"{name} " in result.cause.message
    assert "step 8 of B does not follow" in result.cause.message
    assert "step 8 of A does not follow" in diff(tmp_path / "b.zarr", whole).cause.message


def test_another_program_is_a_kernel(whole: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    other = train(tmp_path / "b.zarr", dtype=dtype, fused=True)
    result = diff(whole, other)
    code, step, variable = found(result)
    assert (code, variable in ("W", "exp_avg", "exp_avg_sq")) == ("kernel", True)
    grads = [StoreReader.open(path).read("grad", (1, step + 1)) for path in (whole, other)]
    assert grads[0].tobytes() == grads[1].tobytes()
    assert "optimizer.implementation" in result.cause.message
    assert ("optimizer.implementation", "single", "fused") in [
        (of.name, of.a, of.b) for of in result.parameters[0].settings
    ]


def test_without_the_replay_a_change_is_taken_for_what_it_looks_like(
    whole: Path, tmp_path: Path
) -> None:
    rewrite(whole, tmp_path / "b.zarr", lambda bits, _: flip_bit(bits["W"], (8, 6, 1), 3))
    assert found(diff(whole, tmp_path / "b.zarr", replay=False)) == ("kernel", 8, "W")


def test_a_state_that_began_with_another_value(whole: Path, tmp_path: Path) -> None:
    rewrite(whole, tmp_path / "b.zarr", lambda bits, _: flip_bit(bits["exp_avg"], (0, 6, 1), 3))
    assert found(diff(whole, tmp_path / "b.zarr")) == ("initial-states", 0, "exp_avg")


def test_weights_come_before_the_states_at_the_first_row(whole: Path, tmp_path: Path) -> None:
    def change(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        for name in ("W", "exp_avg"):
            flip_bit(bits[name], (0, 6, 1), 3)

    rewrite(whole, tmp_path / "b.zarr", change)
    assert found(diff(whole, tmp_path / "b.zarr")) == ("initial-weights", 0, "W")


def test_the_first_step_is_none_at_which_states_begin_anew(whole: Path, tmp_path: Path) -> None:
    rewrite(whole, tmp_path / "b.zarr", lambda bits, _: flip_bit(bits["exp_avg"], (1, 6, 1), 9))
    result = diff(whole, tmp_path / "b.zarr")
    assert found(result) == ("changed-without-step", 1, "exp_avg")


def resumed(path: Path, dtype: torch.dtype, act: Act | None = None, **options: object) -> Path:
    """Record six steps, and resume the recording after them."""
    loop = Loop(dtype=dtype)
    train(path, n_steps=6, loop=loop, **options)
    return train(path, act, loop=loop, resume=True, first=7, **options)


def test_data_that_differ_since_a_resume_are_said_to(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert diff(whole, resumed(tmp_path / "same.zarr", dtype)).is_equal
    result = diff(whole, resumed(tmp_path / "b.zarr", dtype, at(7, other_batch)))
    assert found(result) == ("data", 7, "grad")
    assert "B was resumed after step 6" in result.cause.message


def test_a_row_that_does_not_follow_where_the_run_was_resumed(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    result = diff(whole, resumed(tmp_path / "b.zarr", dtype, at(7, flip)))
    assert found(result)[:2] == ("resume", 7)
    assert "B was resumed, and step 7 of B does not follow" in result.cause.message


def test_a_resume_is_known_where_states_were_not_recorded(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    chosen = {"variables": ("W", "grad")}
    a = train(tmp_path / "a.zarr", dtype=dtype, **chosen)
    b = resumed(tmp_path / "b.zarr", dtype, at(7, lose_moments), **chosen)
    assert found(diff(a, b)) == ("resume", 7, "W")
    c = resumed(tmp_path / "c.zarr", dtype, at(8, lose_moments), **chosen)
    assert found(diff(a, c)) == ("kernel", 8, "W")


def test_without_gradients_data_and_kernel_are_one(dtype: torch.dtype, tmp_path: Path) -> None:
    chosen = {"variables": ("W", "exp_avg")}
    a = train(tmp_path / "a.zarr", dtype=dtype, **chosen)
    b = train(tmp_path / "b.zarr", at(5, other_batch), dtype=dtype, **chosen)
    assert found(diff(a, b)) == ("data-or-kernel", 5, "exp_avg")


def test_what_lies_between_recorded_steps_is_not_blamed(dtype: torch.dtype, tmp_path: Path) -> None:
    a = train(tmp_path / "a.zarr", dtype=dtype, schedule=every(5))
    b = train(tmp_path / "b.zarr", at(7, other_batch), dtype=dtype, schedule=every(5))
    assert found(diff(a, b))[:2] == ("between-steps", 9)


def test_who_differs_at_the_first_common_step_parted_before_it(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    b = train(tmp_path / "b.zarr", at(2, other_batch), dtype=dtype, schedule=lambda step: step > 3)
    assert found(diff(whole, b))[:2] == ("before-the-record", 3)


def test_only_the_loss_is_a_sign_of_nothing_recorded(whole: Path, tmp_path: Path) -> None:
    def change(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        scalars["loss"][4] += 1
        flip_bit(bits["W"], (8, 6, 1), 3)

    rewrite(whole, tmp_path / "b.zarr", change)
    assert found(diff(whole, tmp_path / "b.zarr")) == ("loss", 4, "loss")


# --- what is equal, and how it was compared ------------------------------------------------------


def n_chunks(path: Path) -> int:
    schema = StoreReader.open(path).schema
    layout, n_rows = schema.layout, N_STEPS + 1
    blocks = layout.capacity(n_rows) // layout.block_steps
    return 4 * blocks * (layout.shard_tokens(11) // layout.chunk_tokens)


def test_equal_chunks_are_not_decoded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "b.zarr")
    decoded = []
    decode_chunk = ShardFile.decode
    monkeypatch.setattr(
        ShardFile, "decode", lambda self, chunk: decoded.append(1) or decode_chunk(self, chunk)
    )
    result = diff(whole, tmp_path / "b.zarr")
    compared = result.parameters[0].compared
    assert (compared.by_checksum, compared.by_value, len(decoded)) == (n_chunks(whole), 0, 0)
    assert (result.is_equal, result.cause, result.first) == (True, None, None)
    assert result.parameters[0].growth == ()
    compared = diff(whole, tmp_path / "b.zarr", values=True).parameters[0].compared
    assert (compared.by_checksum, compared.by_value) == (0, n_chunks(whole))
    assert len(decoded) >= 2 * n_chunks(whole)


def test_other_blocks_and_chunks_are_compared_by_value(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    other = train(tmp_path / "b.zarr", dtype=dtype, memory_bytes=30_000)
    assert StoreReader.open(other).schema.layout != StoreReader.open(whole).schema.layout
    result = diff(whole, other)
    assert result.is_equal
    compared = result.parameters[0].compared
    assert (compared.by_checksum, compared.by_value) == (0, n_chunks(whole))
    assert "layout.block_steps" in [of.name for of in result.parameters[0].settings]


def test_other_order_of_tokens_is_compared_by_value(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    other = train(tmp_path / "b.zarr", dtype=dtype, labels=None)
    assert StoreReader.open(other).schema.stored_last is None
    assert StoreReader.open(whole).schema.stored_last is not None
    result = diff(whole, other)
    assert (result.is_equal, result.parameters[0].compared.by_checksum) == (True, 0)


def test_runs_of_another_length_are_compared_where_both_are(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    short = train(tmp_path / "b.zarr", dtype=dtype, n_steps=6)
    result = diff(whole, short)
    compared = result.parameters[0].compared
    assert result.is_equal
    assert (compared.steps, compared.n_steps) == ((0, 6), 7)
    assert (compared.n_only_a, compared.n_only_b) == (7, 0)
    assert compared.by_checksum >= compared.by_value > 0  # the last block is not full in one
    other = train(tmp_path / "c.zarr", at(9, other_batch), dtype=dtype)
    assert diff(short, other).is_equal
    assert found(diff(whole, other)) == ("data", 9, "grad")


def test_tokens_that_both_have_are_compared(
    whole: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    part = train(tmp_path / "b.zarr", dtype=dtype, tokens=[1, 3, 4, 9])
    result = diff(whole, part)
    assert (result.is_equal, result.parameters[0].compared.n_tokens) == (True, 4)
    rewrite(whole, tmp_path / "c.zarr", lambda bits, _: flip_bit(bits["W"], (8, 9, 1), 3))
    first = diff(tmp_path / "c.zarr", part).first
    assert (first.variable, first.step, first.token, first.dim) == ("W", 8, 9, 1)
    rewrite(whole, tmp_path / "d.zarr", lambda bits, _: flip_bit(bits["W"], (8, 8, 1), 3))
    assert diff(tmp_path / "d.zarr", part).is_equal


def test_steps_that_both_have_are_compared(whole: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    some = train(tmp_path / "b.zarr", dtype=dtype, schedule=every(5))
    result = diff(whole, some)
    assert (result.is_equal, result.parameters[0].compared.n_steps) == (True, 4)
    rewrite(whole, tmp_path / "c.zarr", lambda bits, _: flip_bit(bits["grad"], (10, 2, 3), 1))
    assert found(diff(tmp_path / "c.zarr", some)) == ("changed-without-step", 10, "grad")
    rewrite(whole, tmp_path / "d.zarr", lambda bits, _: flip_bit(bits["grad"], (8, 2, 3), 1))
    assert diff(tmp_path / "d.zarr", some).is_equal


def widened(store: Path, path: Path, *places: tuple[str, tuple[int, int, int], int]) -> Path:
    """Write a bfloat16 run as float32, with some bits flipped."""
    reader = StoreReader.open(store)
    dtypes = dict.fromkeys(reader.schema.dtypes, "float32")
    bits = {
        name: decode(reader.read(name, (0, reader.n_rows)), "bfloat16").copy() for name in dtypes
    }
    for name, place, bit in places:
        flip_bit(bits[name], place, bit)
    schema = replace(reader.schema, dtypes=dtypes, stored_last=None)
    return write_store(path, schema, bits, reader.read_scalars())


def test_exact_numbers_of_other_dtypes_are_compared(toy_path: Path, tmp_path: Path) -> None:
    result = diff(toy_path, widened(toy_path, tmp_path / "b.zarr"))
    compared = result.parameters[0].compared
    assert result.is_equal
    assert compared.other_dtypes == compared.variables == ("W", "grad", "exp_avg", "exp_avg_sq")
    assert compared.by_checksum == 0
    # A bit that no bfloat16 number has, and the sign of a zero.
    b = widened(toy_path, tmp_path / "c.zarr", ("grad", (5, 4, 3), 2), ("exp_avg", (0, 2, 1), 31))
    by_name = {of.variable: of for of in diff(toy_path, b, replay=False).parameters[0].differences}
    assert {name: (of.step, of.token, of.dim) for name, of in by_name.items()} == {
        "grad": (5, 4, 3),
        "exp_avg": (0, 2, 1),
    }
    assert by_name["grad"].ulp is None
    assert by_name["grad"].a != by_name["grad"].b


def test_missing_is_missing_and_no_number(toy_path: Path, tmp_path: Path) -> None:
    def drop(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        bits["exp_avg"][6] = 0x7FC0
        scalars["loss"][5] = np.nan

    rewrite(toy_path, tmp_path / "b.zarr", drop)
    shutil.copytree(tmp_path / "b.zarr", tmp_path / "c.zarr")
    assert diff(tmp_path / "b.zarr", tmp_path / "c.zarr").is_equal
    result = diff(toy_path, tmp_path / "b.zarr", replay=False)
    by_name = {of.variable: of for of in result.parameters[0].differences}
    assert (by_name["loss"].step, by_name["exp_avg"].step) == (5, 6)
    for name in by_name:
        assert np.isnan(by_name[name].b)
        assert by_name[name].ulp == np.inf
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["parameters"][0]["differences"][0]["b"] is None


def test_what_was_altered_later_is_seen_where_values_are_compared(
    toy_path: Path, toy_copy: Path
) -> None:
    sizes = {file: file.stat().st_size for file in (toy_copy / "W").glob("c.*")}
    flip_in_place(toy_copy, "W", (9, 3, 1), 2)
    (changed,) = [
        file for file in sizes if file.read_bytes() != (toy_path / "W" / file.name).read_bytes()
    ]
    with changed.open("r+b") as file:  # of the size that was committed, as a flipped bit leaves it
        file.truncate(changed.stat().st_size)
    seen = diff(toy_path, toy_copy, values=True)
    assert found(seen) == ("changed-without-step", 9, "W")
    by_checksum = diff(toy_path, toy_copy)
    n_recorded = by_checksum.parameters[0].compared.by_checksum
    # Not equal silently: either the file has another size, or the result says what was not decoded.
    assert by_checksum.is_equal == (changed.stat().st_size == sizes[changed])
    assert n_recorded > 0


def test_files_of_another_size_are_not_taken_for_what_was_recorded(
    toy_path: Path, toy_copy: Path
) -> None:
    file = next((toy_copy / "W").glob("c.1.*"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DamagedStoreError, match="W from step"):
        diff(toy_path, toy_copy)
    file.unlink()
    with pytest.raises(DamagedStoreError, match="missing"):
        diff(toy_path, toy_copy)


# --- several parameters --------------------------------------------------------------------------


def test_parameters_are_paired_by_name(zoo: Recorded, tmp_path: Path) -> None:
    shutil.copytree(zoo.path, tmp_path / "b.zarr")
    result = diff(zoo.path, tmp_path / "b.zarr")
    names = [reader.schema.parameter for reader in StoreReader.open_each(zoo.path)]
    assert [of.name for of in result.parameters] == names
    assert result.is_equal

    def change(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        flip_bit(bits["up/W"], (6, 2, 3), 2)
        flip_bit(bits["filter/exp_avg"], (4, 2, 3), 2)

    rewrite(zoo.path, tmp_path / "c.zarr", change)
    result = diff(zoo.path, tmp_path / "c.zarr")
    assert found(result) == ("changed-without-step", 4, "exp_avg")
    assert result.diverged.name == "filter"
    assert [of.name for of in result.parameters if not of.is_equal] == ["filter", "up"] or sorted(
        of.name for of in result.parameters if not of.is_equal
    ) == ["filter", "up"]
    assert diff(zoo.path, tmp_path / "c.zarr", parameters=["query", "norm"]).is_equal
    assert not diff(zoo.path, tmp_path / "c.zarr", parameters="u*").is_equal


def test_parameters_of_other_names_are_paired_when_asked(
    zoo: Recorded, toy_path: Path, tmp_path: Path
) -> None:
    result = diff(zoo.path, zoo.path, parameters="wte.weight=query")
    assert result.parameters[0].parameters == ("wte.weight", "query")
    assert not result.is_equal
    alone = diff(toy_path, zoo.path, parameters="*=query")
    assert alone.parameters[0].parameters == (None, "query")
    some = diff(zoo.path, zoo.path, parameters=["wte.weight=query", "norm"])
    assert [of.parameters for of in some.parameters] == [("norm", "norm"), ("wte.weight", "query")]
    assert (some.only_a, some.only_b) == ((), ())
    with pytest.raises(SelectionError, match="no parameter nothing"):
        diff(zoo.path, zoo.path, parameters="nothing")


def test_a_name_may_have_the_sign_that_pairs_names(tmp_path: Path) -> None:
    loop = Loop()
    named = {"x=1": loop.weight, "x": loop.head.weight}
    with Recorder(tmp_path / "a.zarr", loop.optimizer, parameters=named) as recorder:
        recorder.log(loss=loop.step())

    def paired(pattern: str) -> list[tuple[str | None, str | None]]:
        found = diff(tmp_path / "a.zarr", tmp_path / "a.zarr", parameters=pattern)
        return [of.parameters for of in found.parameters]

    assert paired("x=1") == [("x=1", "x=1")]
    assert paired("x=1=x") == [("x=1", "x")]
    assert paired("x=x=1") == [("x", "x=1")]
    assert paired("x=x") == [("x", "x")]


def test_what_only_one_has_is_said(zoo: Recorded, tmp_path: Path) -> None:
    loop = Loop()
    named = {"query": loop.weight, "other": loop.head.bias}
    with Recorder(tmp_path / "b.zarr", loop.optimizer, parameters=named) as recorder:
        recorder.log(loss=loop.step())
    result = diff(zoo.path, tmp_path / "b.zarr")
    assert [of.name for of in result.parameters] == ["query"]
    assert result.only_b == ("other",)
    assert {"query", "up"} & {*result.only_a} == {"up"}
    with pytest.raises(ConfigError, match="rows of one shape"):
        diff(zoo.path, tmp_path / "b.zarr", parameters="up=query")
    named = {"x": loop.head.bias, "y": loop.weight}
    with Recorder(tmp_path / "c.zarr", loop.optimizer, parameters=named) as recorder:
        recorder.log(loss=loop.step())
    with pytest.raises(SelectionError, match=r"no parameter is in both.*has query, other, and"):
        diff(tmp_path / "b.zarr", tmp_path / "c.zarr")


def test_runs_without_a_common_step_or_token_cannot_be_compared(tmp_path: Path) -> None:
    early = train(tmp_path / "a.zarr", schedule=lambda step: step < 4)
    late = train(tmp_path / "b.zarr", schedule=lambda step: step > 7)
    with pytest.raises(ConfigError, match="no step in common"):
        diff(early, late)
    some = train(tmp_path / "c.zarr", tokens=[1, 2])
    others = train(tmp_path / "d.zarr", tokens=[3])
    with pytest.raises(ConfigError, match="no token in common"):
        diff(some, others)


# --- other sources, settings, growth -------------------------------------------------------------


def test_a_notebooks_file_is_compared(toy_path: Path, toy_history: History, tmp_path: Path) -> None:
    file = save(tmp_path / "run.safetensors", notebook_tensors(toy_history))
    result = diff(toy_path, file)
    arrays = [of for of in result.parameters[0].differences if of.token is not None]
    assert arrays == []
    assert result.parameters[0].compared.by_checksum == 0
    rewrite(toy_path, tmp_path / "b.zarr", lambda bits, _: flip_bit(bits["W"], (8, 6, 1), 3))
    arrays = [
        (of.variable, of.step, of.token, of.dim)
        for of in diff(tmp_path / "b.zarr", file).parameters[0].differences
        if of.token is not None
    ]
    assert arrays == [("W", 8, 6, 1)]


def test_what_runs_say_of_themselves_is_compared(toy_path: Path, tmp_path: Path) -> None:
    relabel(
        toy_path,
        tmp_path / "b.zarr",
        software={"torch": "2.0.0"},
        device="cuda",
        optimizer={"maximize": True},
        attrs={"config": {"seed": 7}},
        created="2020-01-01T00:00:00+00:00",
    )
    result = diff(toy_path, tmp_path / "b.zarr")
    assert result.is_equal
    told = {of.name: (of.a, of.b) for of in result.parameters[0].settings}
    torch_version = StoreReader.open(toy_path).schema.software["torch"]
    assert told == {
        "software.torch": (torch_version, "2.0.0"),
        "device": ("cpu", "cuda"),
        "optimizer.maximize": (False, True),
        "attrs.config.seed": (None, 7),
    }


def test_growth_is_what_numpy_finds(whole: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    other = train(tmp_path / "b.zarr", at(3, other_batch), dtype=dtype)
    growth = diff(whole, other).parameters[0].growth
    assert [of.step for of in growth if of.variable == "W"] == [3, 4, 5, 7, 11, 13]
    readers = [StoreReader.open(path) for path in (whole, other)]
    for of in growth:
        bits = [reader.read(of.variable, (of.step, of.step + 1)) for reader in readers]
        a, b = (decode(each, readers[0].schema.dtypes[of.variable]).astype(float) for each in bits)
        assert of.n_different == np.count_nonzero(a != b)
        assert of.n_elements == 55
        expected = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert of.relative == pytest.approx(expected, rel=1e-12)
        assert of.share == of.n_different / 55
        assert (of.max_ulp > 0) == (of.n_different > 0)


@pytest.mark.parametrize("pieces", [1, 60, 2**21])
def test_the_first_difference_is_the_first_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    """Tokens 0 and 3 lie on disk after all others, two tokens a chunk."""
    monkeypatch.setattr("thimble_zarr.tuning.TUNING", replace(TUNING, window_elements=pieces))
    schema = Schema(
        shape=(11, 3),
        dims=("token", "dim"),
        dtypes={"W": "bfloat16", "grad": "bfloat16"},
        layout=Layout(4, 2),
        optimizer=OPTIMIZER,
        stored_last=packed_mask(np.isin(np.arange(11), (0, 3))),
    )
    truth = {name: np.ones((13, 11, 3)) for name in schema.dtypes}
    changed = {name: of.copy() for name, of in truth.items()}
    for place in [(7, 0, 0), (6, 10, 2), (6, 8, 2), (6, 3, 2), (6, 3, 1), (7, 1, 1)]:
        changed["grad"][place] = 1 + 2**-6
    recording = schema, np.arange(13), np.arange(11)
    a = recorded(tmp_path / "a.zarr", recording, truth)
    b = recorded(tmp_path / "b.zarr", recording, changed)
    for values in (False, True):
        result = diff(a, b, values=values, replay=False)
        first = result.first
        assert (first.variable, first.step, first.token, first.dim) == ("grad", 6, 3, 1)
        assert (first.n_different, first.n_elements, first.ulp) == (4, 33, 2)
        assert (first.a, first.b) == (1, 1 + 2**-6)


@pytest.mark.parametrize("what", ["order", "ids", "steps"])
def test_equal_checksums_of_other_elements_say_nothing(tmp_path: Path, what: str) -> None:
    """Two stores with the same bytes on disk, which are of other tokens or steps in each."""
    schema = Schema(
        shape=(5, 3),
        dims=("token", "dim"),
        dtypes={"W": "bfloat16"},
        layout=Layout(4, 5),
        optimizer=OPTIMIZER,
        whole_tokens=11,
        schedule="some",
    )
    truth = {"W": np.arange(13 * 11 * 3.0).reshape(13, 11, 3) % 191}
    one, ids, steps = (schema, np.arange(8), np.arange(5)), np.arange(5), np.arange(8)
    other = replace(schema, stored_last=packed_mask(ids < 2)) if what == "order" else schema
    there = {"W": truth["W"].copy()}
    if what == "order":
        there["W"][:, [2, 3, 4, 0, 1]] = truth["W"][:, :5]
    elif what == "ids":
        ids = ids + 1
        there["W"][:, 1:] = truth["W"][:, :-1]
    else:
        steps = steps + 1
        there["W"][1:] = truth["W"][:-1]
    a = recorded(tmp_path / "a.zarr", one, truth)
    b = recorded(tmp_path / "b.zarr", (other, steps, ids), there)
    sums = [StoreReader.open(path).chunk_checksums().of_block("W", 0) for path in (a, b)]
    chunk = encode(truth["W"][:4, :5], "bfloat16").transpose(1, 0, 2)
    values = values_checksum(np.ascontiguousarray(chunk))
    assert sums[0].tolist() == sums[1].tolist() == [values]
    assert not diff(a, b, replay=False).is_equal


def test_a_result_is_data(toy_path: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "b.zarr", at(5, other_batch))
    content = json.loads(json.dumps(diff(toy_path, other).to_json(), allow_nan=False))
    assert (content["equal"], content["cause"]["code"]) == (False, "data")
    assert content["first"] == content["parameters"][0]["differences"][0]
    assert content["parameters"][0]["compared"]["steps"] == [0, 13]
    assert thimble_zarr.diff is diff


# --- whatever was recorded, and however it lies on disk ------------------------------------------


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Schema, np.ndarray, np.ndarray]:
    """Draw a schema, and which steps and which of eleven tokens were recorded."""
    n_all = 13
    ids = np.array(sorted(draw(st.sets(st.integers(0, 10), min_size=1))))
    if draw(st.booleans()):
        ids = np.arange(11)
    n_rows = draw(st.integers(1, n_all))
    steps, schedule = np.arange(n_rows), None
    if draw(st.booleans()):
        steps, schedule = np.sort(draw(st.permutations(range(n_all)))[:n_rows]), "some"
    layout = Layout(2 ** draw(st.integers(0, 3)), draw(st.integers(1, len(ids))))
    last = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    schema = Schema(
        shape=(len(ids), 3),
        dims=("token", "dim"),
        dtypes={"W": "bfloat16", "grad": draw(st.sampled_from(["bfloat16", "float32"]))},
        layout=layout,
        optimizer=OPTIMIZER,
        whole_tokens=None if len(ids) == 11 else 11,
        stored_last=packed_mask(np.array(last)) if draw(st.booleans()) else None,
        schedule=schedule,
    )
    return schema, steps, ids


def recorded(
    path: Path, recording: tuple[Schema, np.ndarray, np.ndarray], truth: dict[str, np.ndarray]
) -> Path:
    """Write what a recording has of all numbers, which are of shape `(step, token, dim)`."""
    schema, steps, ids = recording
    bits = {
        name: encode(truth[name][steps][:, ids], native) for name, native in schema.dtypes.items()
    }
    scalars = {name: np.ones(len(steps)) for name in schema.scalars}
    some = None if schema.whole_tokens is None else ids
    labelled = None if schema.schedule is None else steps
    return write_store(path, schema, bits, scalars, steps=labelled, token_ids=some)


@given(recordings(), recordings(), st.booleans(), st.booleans(), st.data())
@settings(max_examples=50)  # others in each run
def test_whatever_was_recorded_the_first_difference_is_found(
    one: tuple[Schema, np.ndarray, np.ndarray],
    other: tuple[Schema, np.ndarray, np.ndarray],
    is_alike: bool,
    values: bool,
    data: st.DataObject,
) -> None:
    random = np.random.default_rng(0)
    truth = {name: random.integers(-9, 9, (13, 11, 3)).astype(float) for name in ("W", "grad")}
    changed = {name: of.copy() for name, of in truth.items()}
    places = st.tuples(st.integers(0, 12), st.integers(0, 10), st.integers(0, 2))
    for name in truth:
        for place in data.draw(st.lists(places, max_size=4)):
            changed[name][place] += 100
    other = one if is_alike else other
    steps, ids = np.intersect1d(one[1], other[1]), np.intersect1d(one[2], other[2])
    with TemporaryDirectory() as directory:
        a = recorded(Path(directory, "a.zarr"), one, truth)
        b = recorded(Path(directory, "b.zarr"), other, changed)
        if not (len(steps) and len(ids)):
            with pytest.raises(ConfigError, match="in common"):
                diff(a, b)
            return
        result = diff(a, b, values=values, replay=False)
    expected = {}
    for name in truth:
        differ = (truth[name] != changed[name])[steps][:, ids]
        if differ.any():
            row, token, dim = np.argwhere(differ)[0]
            n_different = int(differ[row].sum())
            expected[name] = (int(steps[row]), int(ids[token]), int(dim), n_different)
    (parameter,) = result.parameters
    assert {
        of.variable: (of.step, of.token, of.dim, of.n_different) for of in parameter.differences
    } == expected
    assert parameter.compared.n_steps == len(steps)
    if is_alike and not values and not expected:
        assert parameter.compared.by_value == 0
