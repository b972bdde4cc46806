"""Rows of which training copied the gradient only: filled in to the bit, or missing and said so."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.alien import ALIENS, Training
from tests.support.draws import draw, gradient
from tests.support.optimizers import ELEMENTWISE, Kind, change_betas, kinds
from tests.support.runs import Loop, threads
from tests.support.zoo import record_zoo
from thimble_zarr import Recorder, check, every, recode
from thimble_zarr.bits import is_nan, same_bits
from thimble_zarr.errors import AuditError, ConfigError
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.optim.lanes import Lanes
from thimble_zarr.record import block as block_module
from thimble_zarr.record.audit.finding import AuditFinding
from thimble_zarr.record.parameters import choose, declare
from thimble_zarr.record.replay import keyframes
from thimble_zarr.record.replay.torch_steps import TorchSteps
from thimble_zarr.store.reader import StoreReader

BLOCK, MEMORY = 16, 22_000
"""Blocks of so many rows of 11 x 5 in bfloat16, and the memory that gives them."""

IN_FLOAT16 = ("ASGD", "NAdam", "Rprop")

KINDS = [
    *kinds(
        *(name for name in ELEMENTWISE if name not in IN_FLOAT16),
        natives=("bfloat16",),
        flags=False,
    ),
    *kinds(*IN_FLOAT16, natives=("float16",), flags=False),
    *kinds("AdamW", natives=("float32",), flags=False),
    pytest.param(
        Kind("Adam", "bfloat16", {"weight_decay": 0.1, "foreach": True}, change_betas),
        id="Adam-foreach-bfloat16-betas",  # whose last elements round otherwise than the program
    ),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture(params=[True, False], ids=["portable", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a portable program take the steps, and then torch alone."""
    if not request.param:
        monkeypatch.setattr(keyframes, "program_of", lambda *given: None)


def assert_same_rows(path: Path, other: Path) -> None:
    for one, two in zip(StoreReader.open_each(path), StoreReader.open_each(other), strict=True):
        assert one.n_rows == two.n_rows
        for name in one.schema.dtypes:
            rows = [reader.read(name, (0, reader.n_rows)) for reader in (one, two)]
            assert same_bits(*rows), name
        numbers = one.read_numbers(), two.read_numbers()
        for name, values in numbers[0].items():
            np.testing.assert_array_equal(values, numbers[1][name], err_msg=name)
        assert [*one.read_history().missing] == [*two.read_history().missing] == []
        assert not one.read_history().filled


def take_steps(
    path: Path,
    kind: Kind,
    *,
    n_steps: int = 37,
    without: tuple[int, ...] = (1, 7, 8, 20),
    then: Callable[[Recorder, int], object] = lambda recorder, step: None,
    **options: object,
) -> None:
    """Record a run of drawn gradients, a few of which are missing."""
    generator, shape = torch.Generator().manual_seed(3), (11, 5)
    parameter = nn.Parameter(draw(shape, generator, size=0.02).to(kind.dtype))
    optimizer = kind.make(parameter)
    with Recorder(path, optimizer, parameter=parameter, memory_bytes=MEMORY, **options) as recorder:
        for step in range(1, n_steps + 1):
            parameter.grad = gradient(shape, generator).to(kind.dtype)
            if step in without:
                parameter.grad = None
            optimizer.step()
            recorder.log(loss=step)
            kind.change(optimizer, step)
            parameter.grad = None
            then(recorder, step)


def flush(recorder: Recorder, step: int) -> None:
    if step in (1, 5, 6, 15, 16, 25):
        recorder.flush()


@pytest.mark.filterwarnings("ignore:no gradient at step")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_that_are_copied_whole(tmp_path: Path, kind: Kind) -> None:
    take_steps(tmp_path / "all", kind)
    take_steps(tmp_path / "keyframes", kind, then=flush, keep="keyframes")
    assert_same_rows(tmp_path / "all", tmp_path / "keyframes")


@pytest.mark.filterwarnings("ignore:no gradient at step")
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": [1, 4, 9]},
        {"schedule": every(3)},
        {"schedule": every(2) | every(3)},
        {"coding": "predicted"},
    ],
    ids=["tokens", "every third step", "runs of steps", "predicted"],
)
def test_rows_are_the_same_of_whatever_is_recorded(
    tmp_path: Path, options: dict[str, object]
) -> None:
    kind = Kind("AdamW", "bfloat16")
    for keep in ("all", "keyframes"):
        take_steps(tmp_path / keep, kind, keep=keep, **options)
    assert_same_rows(tmp_path / "all", tmp_path / "keyframes")


@pytest.mark.filterwarnings("ignore:no gradient at step")
def test_rows_are_the_same_of_several_parameters(tmp_path: Path) -> None:
    for keep in ("all", "keyframes"):
        record_zoo(tmp_path / keep, torch.optim.AdamW, keep=keep)
    assert_same_rows(tmp_path / "all", tmp_path / "keyframes")


def test_torchs_threads_make_no_difference(tmp_path: Path) -> None:
    for keep in ("all", "keyframes"):
        with threads(2):
            loop = Loop(n_tokens=997, n_dims=13, dtype=torch.float32)
            with Recorder(tmp_path / keep, loop.optimizer, parameter=loop.weight, keep=keep):
                for _ in range(9):
                    loop.step()
    assert_same_rows(tmp_path / "all", tmp_path / "keyframes")


def test_training_copies_the_rest_of_two_rows_a_block(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    take_row = block_module.Block._take_row

    def count(block: block_module.Block, name: str, *given: object) -> None:
        copied.append(name)
        take_row(block, name, *given)

    monkeypatch.setattr(block_module.Block, "_take_row", count)
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, keep="keyframes", memory_bytes=MEMORY
    ):
        for _ in range(3 * BLOCK - 1):
            loop.step()
    counts = {name: copied.count(name) for name in ("W", "grad", "exp_avg", "exp_avg_sq")}
    assert counts == {"W": 6, "grad": 3 * BLOCK, "exp_avg": 6, "exp_avg_sq": 6}


def alien_run(
    path: Path,
    plant: Callable[[Training], object],
    *,
    at: int,
    n_steps: int = 3 * BLOCK,
    **options: object,
) -> Loop:
    """Record a run in which something else changes something after a step."""
    loop = Loop()
    with Recorder(
        path,
        loop.optimizer,
        parameter=loop.weight,
        keep="keyframes",
        memory_bytes=MEMORY,
        **options,
    ) as recorder:
        training = Training(loop, recorder, np.random.default_rng(0))
        for step in range(1, n_steps + 1):
            training.take_step()
            if step == at:
                plant(training)
    return loop


def flip(training: Training) -> None:
    """Flip a bit of W."""
    training.loop.weight.data.view(torch.int16)[3, 2] ^= 1 << 12


@pytest.mark.parametrize("name", [name for name in ALIENS if name != "bit of W in the row"])
@pytest.mark.usefixtures("both_ways")
def test_rows_that_the_gradients_do_not_prove_are_missing(path: Path, name: str) -> None:
    at = BLOCK + 5
    with pytest.warns(
        UserWarning,
        match=r"step 31 does not follow from step 16: at .*steps 17 to 30 are not known",
    ):
        alien_run(path, ALIENS[name].plant, at=at)
    reader = StoreReader.open(path)
    assert [*reader.read_history().missing] == [(BLOCK + 1, 2 * BLOCK - 1)]
    for name in reader.schema.dtypes:
        missing = is_nan(reader.read(name, (0, reader.n_rows))).all(axis=(1, 2))
        expected = [0] if name == "grad" else [*range(BLOCK + 1, 2 * BLOCK - 1)]
        assert np.flatnonzero(missing).tolist() == expected, name
    result = check(path, tokens="all")
    assert not result.holds
    (subset,) = [*result]
    assert [finding.code for finding in subset.findings] == ["rows-not-kept"]
    assert "from step 16 to step 31" in subset.findings[0].message
    assert "but rows are missing, first at step 17" in subset.verdict.text
    assert not check(path, tokens="all", replay=False).holds
    assert check(path, tokens="all", steps="1:16").holds
    assert check(path, tokens="all", steps="32:48").holds


@pytest.mark.parametrize("audit", ["warn", "raise", "call"])
def test_an_audit_tells_of_it(path: Path, audit: str) -> None:
    told: list[AuditFinding] = []
    if audit == "call":
        alien_run(path, flip, at=BLOCK + 5, audit=told.append)
    elif audit == "warn":
        with pytest.warns(UserWarning, match="step 31 does not follow from step 16"):
            alien_run(path, flip, at=BLOCK + 5, audit=audit)
    else:
        with pytest.raises(AuditError, match="step 31 does not follow from step 16"):
            alien_run(path, flip, at=BLOCK + 5, audit=audit)
    found = [(one.since, one.step, one.token, one.dim, one.variable, one.code) for one in told]
    assert found == [(16, 31, 3, 2, "W", "rows-not-kept")] * (audit == "call")
    audits = StoreReader.open(path).read_history().audits
    assert audits[BLOCK] == AuditCounts(BLOCK, BLOCK - 1)


def test_what_is_missing_is_said_of_a_copy_too(path: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="are not known"):
        alien_run(path, flip, at=BLOCK + 5)
    (reader,) = recode(path, tmp_path / "copy", coding="predicted", memory_bytes=200_000)
    assert reader.schema.layout.block_steps != BLOCK
    missing = sorted(row for rows in reader.read_history().missing for row in range(*rows))
    assert missing == [*range(BLOCK + 1, 2 * BLOCK - 1)]


def test_every_row_is_copied_once_one_was_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[bool] = []
    append = block_module.Block.append

    def note(block: block_module.Block, *given: object, step: int, whole_row: bool) -> None:
        whole.append(whole_row)
        append(block, *given, step=step, whole=whole_row)

    monkeypatch.setattr(
        block_module.Block,
        "append",
        lambda block, *given, step, whole: note(block, *given, step=step, whole_row=whole),
    )
    with pytest.warns(UserWarning, match="From now on every row is copied whole"):
        alien_run(path, flip, at=5, n_steps=5 * BLOCK)
    assert not all(whole[: 2 * BLOCK])
    assert all(whole[3 * BLOCK :])


def test_a_step_that_fails_leaves_the_rows_before_it_unknown(path: Path) -> None:
    loop, begun = Loop(), []

    class BrokenError(Exception):
        pass

    def fail(*given: object) -> None:
        begun.append(loop.weight)
        if len(begun) == BLOCK + 5:
            raise BrokenError

    def run() -> None:
        with Recorder(
            path, loop.optimizer, parameter=loop.weight, keep="keyframes", memory_bytes=MEMORY
        ):
            loop.optimizer.register_step_pre_hook(fail)
            for _ in range(2 * BLOCK):
                loop.step()

    with pytest.raises(BrokenError):
        run()
    reader = StoreReader.open(path)
    assert reader.n_rows == BLOCK + 5
    assert [*reader.read_history().missing] == [(BLOCK + 1, BLOCK + 5)]
    assert is_nan(reader.read("W", (BLOCK + 1, BLOCK + 5))).all()
    assert not is_nan(reader.read("grad", (BLOCK + 1, BLOCK + 5))).any()
    (subset,) = [*check(path, tokens="all")]
    assert "ended within a step" in subset.findings[0].message


def test_a_flush_within_a_step_is_made_good_later(tmp_path: Path) -> None:
    missing = []
    for keep in ("all", "keyframes"):
        loop = Loop()
        with Recorder(
            tmp_path / keep,
            loop.optimizer,
            parameter=loop.weight,
            keep=keep,
            memory_bytes=MEMORY,
        ) as recorder:
            for step in range(1, BLOCK + 3):
                hook = None
                if step == 7:
                    hook = loop.optimizer.register_step_pre_hook(lambda *given: recorder.flush())
                loop.step()
                if hook is not None:
                    hook.remove()
                    missing.append([*StoreReader.open(tmp_path / keep).read_history().missing])
    assert missing == [[], [(1, 7)]]
    assert_same_rows(tmp_path / "all", tmp_path / "keyframes")


@pytest.mark.parametrize("stop", [BLOCK - 1, BLOCK + 4], ids=["whole block", "within a block"])
def test_a_run_goes_on(tmp_path: Path, stop: int) -> None:
    for keep in ("all", "keyframes"):
        loop = Loop()
        for n_steps in (stop, 2 * BLOCK - stop):
            with Recorder(
                tmp_path / keep,
                loop.optimizer,
                parameter=loop.weight,
                keep=keep,
                memory_bytes=MEMORY,
                resume=True,
            ):
                for _ in range(n_steps):
                    loop.step()
    assert_same_rows(tmp_path / "all", tmp_path / "keyframes")


def test_a_run_that_goes_on_still_says_what_is_missing(path: Path) -> None:
    with pytest.warns(UserWarning, match="steps 17 to 23 are not known"):
        loop = alien_run(path, flip, at=BLOCK + 5, n_steps=BLOCK + 7)
    with Recorder(
        path,
        loop.optimizer,
        parameter=loop.weight,
        keep="keyframes",
        memory_bytes=MEMORY,
        resume=True,
    ):
        for _ in range(BLOCK):
            loop.step()
    reader = StoreReader.open(path)
    assert [*reader.read_history().missing] == [(BLOCK + 1, BLOCK + 8)]
    assert check(path, tokens="all", steps=f"{BLOCK + 8}:{2 * BLOCK + 7}").holds


@pytest.mark.parametrize("n_steps", [1, 3], ids=["the row before is whole", "it is not"])
def test_what_changed_before_a_flush_is_told(path: Path, n_steps: int) -> None:
    """What is copied at a flush may not be what the last step left: nobody knows that row."""
    loop = Loop()
    recorder = Recorder(
        path, loop.optimizer, parameter=loop.weight, keep="keyframes", memory_bytes=MEMORY
    )
    for _ in range(n_steps):
        loop.step()
    flip(Training(loop, recorder, np.random.default_rng(0)))
    recorder.flush()
    with pytest.warns(UserWarning, match=f"step {n_steps} does not follow from step 0"):
        loop.step()
    for _ in range(4):
        loop.step()
    recorder.close()
    reader = StoreReader.open(path)
    assert [*reader.read_history().missing] == [(1, n_steps + 1)]
    assert check(path, tokens="all", steps=f"{n_steps + 2}:{n_steps + 5}").holds
    (subset,) = [*check(path, tokens="all")]
    assert [finding.code for finding in subset.findings] == ["rows-not-kept"]


def test_an_error_costs_the_rows_between_keyframes_and_no_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(keyframes._Steps, "fill", fail)
    with pytest.warns(UserWarning, match="cannot be worked out: ZeroDivisionError: of the test"):
        alien_run(path, lambda training: None, at=1)
    reader = StoreReader.open(path)
    assert reader.n_rows == 3 * BLOCK + 1
    assert next(iter(reader.read_history().missing)) == (1, BLOCK - 1)
    assert is_nan(reader.read("W", (1, BLOCK - 1))).all()
    assert not is_nan(reader.read("W", (2 * BLOCK + 1, 3 * BLOCK + 1))).any()


def test_the_store_says_which_rows_were_worked_out(path: Path, tmp_path: Path) -> None:
    take_steps(path, Kind("AdamW", "bfloat16"), without=(), keep="keyframes")
    (copy,) = recode(path, tmp_path / "copy", memory_bytes=200_000)
    for reader in (StoreReader.open(path), copy):
        filled = sorted(row for rows in reader.read_history().filled for row in range(*rows))
        assert filled == [*range(1, 15), *range(17, 31), *range(33, 37)]
    result = check(path, tokens="all")
    assert result.holds
    assert "32 of these rows were not copied" in result.verdict


def test_what_cannot_be_taken_again_is_copied_whole(path: Path) -> None:
    weight = nn.Parameter(torch.zeros(5, 11, dtype=torch.bfloat16).T)
    optimizer = torch.optim.AdamW([weight])
    with pytest.warns(UserWarning, match="cannot be left to keep='keyframes': its memory is not"):
        recorder = Recorder(path, optimizer, parameter=weight, keep="keyframes")
    with recorder:
        for _ in range(5):
            weight.grad = torch.ones(11, 5, dtype=torch.bfloat16)
            optimizer.step()
    reader = StoreReader.open(path)
    assert not is_nan(reader.read("W", (0, 6))).any()
    assert [*reader.read_history().missing] == []


def test_places_of_elements_take_no_memory_of_a_whole_row() -> None:
    weight = nn.Parameter(torch.zeros(2**15 + 3, 31))
    schema = declare(
        choose(torch.optim.SGD([weight]), weight)[1],
        variables=None,
        schedule=None,
        attrs=None,
        memory_bytes=2**28,
        coding="plain",
    )[""]
    schema = replace(schema, n_threads=2)
    tracemalloc.start()
    alone = TorchSteps(schema, None).alone()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    every = np.arange(weight.numel())
    lanes = Lanes.of("foreach", n_elements=weight.numel(), n_threads=2)
    np.testing.assert_array_equal(alone, np.flatnonzero(lanes.are_alone(every)))
    assert len(alone)
    assert peak < every.nbytes


def test_other_ways_to_keep_are_refused(path: Path) -> None:
    loop = Loop()
    with pytest.raises(ConfigError, match="keep is 'some', and can be all or keyframes"):
        Recorder(path, loop.optimizer, parameter=loop.weight, keep="some")
    assert not path.exists()
