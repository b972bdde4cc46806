"""A predicted store is found at fault as a plain one is, though decoding has taken its steps."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.support.faults import Arrays, flip_bit, rewrite
from tests.support.runs import Loop, token_labels
from thimble_zarr import Recorder, accounting, check, every, open_dataset, tuning
from thimble_zarr.analysis.compute.source import TORCH
from thimble_zarr.bits import patterns
from thimble_zarr.optim.programs.compiled import is_available
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.store.reader import StoreReader

pytestmark = pytest.mark.skipif(not is_available(), reason="kernels cannot be compiled here")

N_STEPS, BLOCK = 11, 4
CODINGS = ("plain", "predicted")

Fault = Callable[[Arrays, Arrays], object]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, and parts of it, in both codings, by part and coding: several blocks and chunks."""
    directory, loop = tmp_path_factory.mktemp("runs"), Loop(foreach=False)
    parts = {
        "run": {"labels": token_labels(), "memory_bytes": 6_000},
        "tokens": {"tokens": [10, 2, 7], "memory_bytes": 3_000},
        "schedule": {"schedule": every(3), "memory_bytes": 6_000},
    }
    names = [f"{part} {coding}" for part in parts for coding in ("plain", "predicted")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thimble_zarr.format.layout.TARGET_CHUNK_BYTES", 150)
        recorders = [
            Recorder(
                directory / name,
                loop.optimizer,
                parameter=loop.weight,
                coding=name.split()[1],
                **parts[name.split()[0]],
            )
            for name in names
        ]
    for step in range(1, N_STEPS + 1):
        loop.backward()
        if step == 6:
            loop.weight.grad = None
        if step == 10:
            loop.weight.grad[3, 1] = np.nan
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no gradient at step 6")
            loop.optimizer.step()
        loop.optimizer.zero_grad()
    for recorder in recorders:
        recorder.close()
    return {name: directory / name for name in names}


def alien(row: int) -> Fault:
    def write(bits: Arrays, scalars: Arrays) -> None:
        patterns(bits["W"])[row:, 2] ^= 1

    return write


def flipped(name: str, row: int) -> Fault:
    return lambda bits, scalars: flip_bit(bits[name], (row, 9, 4), 6)


def wrong_rate(bits: Arrays, scalars: Arrays) -> None:
    scalars["learning_rate"][7] *= 1.5


def not_numbers(bits: Arrays, scalars: Arrays) -> None:
    bits["W"][5, 1:4] = 0x7FC0
    bits["exp_avg"][8, 0] = 0xFF80


def nothing(bits: Arrays, scalars: Arrays) -> None:
    """Leave the run as it is."""


FAULTS: dict[str, Fault] = {
    "none": nothing,
    "alien write inside of a block": alien(6),
    "alien write at the first row of a block": alien(2 * BLOCK),
    "flipped in a keyframe": flipped("exp_avg", BLOCK),
    "flipped in the last row of a block": flipped("exp_avg_sq", 2 * BLOCK - 1),
    "flipped gradient": flipped("grad", 2),
    "wrong learning rate": wrong_rate,
    "not numbers": not_numbers,
}


def found(path: Path, **options: object) -> dict[str, object]:
    content = check(path, tokens="all", **options).to_json()
    assert isinstance(content, dict)
    return {name: of for name, of in content.items() if name not in ("store", "path")}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_found_is_what_is_found_in_a_plain_store(
    fault: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    for coding in CODINGS:
        rewrite(runs[f"run {coding}"], tmp_path / coding, FAULTS[fault])
    plain, predicted = (found(tmp_path / coding) for coding in CODINGS)
    replay = plain["replay"]
    assert isinstance(replay, dict)
    assert all(of["equal"] == of["total"] for of in replay.values()) == (fault == "none")
    assert predicted == plain
    rows = [7, 2, 5, 6, 9]  # in any order, and not one after the other
    plain, predicted = (
        accounting(open_dataset(tmp_path / coding).isel(step=rows), formula=False)
        for coding in CODINGS
    )
    xr.testing.assert_identical(plain, predicted)


@pytest.mark.parametrize("part", ["tokens", "schedule"])
def test_parts_of_a_run(part: str, runs: dict[str, Path]) -> None:
    plain, predicted = (found(runs[f"{part} {coding}"]) for coding in CODINGS)
    assert predicted == plain


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps the check had taken by a program, call by call."""
    n_steps: list[int] = []
    real = PortableProgram.differs

    def differs(*args: object, **options: object) -> dict[str, np.ndarray]:
        n_steps.append(len(args[2]))
        return real(*args, **options)

    monkeypatch.setattr(PortableProgram, "differs", differs)
    return n_steps


def test_no_step_is_taken_twice(
    runs: dict[str, Path], taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs["run predicted"]
    small = replace(tuning.TUNING, part_bytes=8)  # a window is a block
    monkeypatch.setattr(tuning, "TUNING", small)
    check(path, tokens="all", formula=False, workers=1)
    # The first steps of the second and third block, and those beside one that was skipped.
    assert taken == [1, 3, 1]
    taken.clear()
    assert found(path, replay=TORCH, workers=1)["replayed_by"] == TORCH
    assert taken == []


def test_a_step_with_other_numbers_is_another_step(runs: dict[str, Path]) -> None:
    prediction = StoreReader.open(runs["run predicted"]).arrays.prediction
    program, numbers = prediction.program, prediction.numbers
    assert program is not None
    assert numbers is not None
    steps = slice(0, N_STEPS + 1)
    assert np.flatnonzero(~prediction.takes(steps, program, numbers)).tolist() == [0, 6]
    table = numbers.table.copy()
    table[4, -1] = np.nextafter(table[4, -1], np.float32(1))
    other = replace(numbers, table=table)
    assert np.flatnonzero(~prediction.takes(steps, program, other)).tolist() == [0, 4, 6]
    amsgrad = replace(program, optimizer=replace(program.optimizer, amsgrad=True))
    assert not prediction.takes(steps, amsgrad, numbers).any()
