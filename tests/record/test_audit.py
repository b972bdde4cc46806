"""The audit while a run trains: it reports every change that no step made, and nothing else."""

import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.alien import ALIENS, Alien, Training
from tests.support.draws import draw, gradient, needs_vectors
from tests.support.optimizers import Kind, change_betas, kinds
from tests.support.runs import TINY_MEMORY, Loop, threads
from thimble_zarr import Recorder, check, every
from thimble_zarr.bits import decode
from thimble_zarr.errors import AuditError, ConfigError, RecordingError
from thimble_zarr.format import layout
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.schema import row_size
from thimble_zarr.record.audit import audit as audit_module
from thimble_zarr.record.audit import parameter as parameter_module
from thimble_zarr.record.audit.finding import AuditFinding
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

N_STEPS, BLOCK = 41, 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture(params=[True, False], ids=["portable", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a portable program take the steps, and then torch alone."""
    if not request.param:
        monkeypatch.setattr(parameter_module, "program_of", lambda *given: None)


def audited_steps(path: Path) -> AuditCounts:
    """Return what the ledger says of the whole run."""
    return sum(StoreReader.open(path).read_history().audits.values(), AuditCounts())


def take_steps(
    path: Path, kind: Kind, n_steps: int, shape: tuple[int, int], seed: int = 0
) -> AuditCounts:
    """Record a run of drawn gradients, a few of which are missing; any finding is an error."""
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(draw(shape, generator, size=0.02).to(kind.dtype))
    optimizer = kind.make(parameter)
    with Recorder(path, optimizer, parameter=parameter, audit="raise", max_overhead=None) as found:
        for step in range(1, n_steps + 1):
            optimizer.zero_grad()
            parameter.grad = gradient(shape, generator).to(kind.dtype)
            optimizer.step()
            kind.change(optimizer, step)
    return found.audited


@pytest.mark.parametrize("kind", kinds())
def test_no_step_of_any_program_is_told(path: Path, kind: Kind) -> None:
    assert take_steps(path, kind, 37, (23, 13)) == AuditCounts(37, 0)
    assert audited_steps(path) == AuditCounts(37, 0)


@pytest.mark.soak
@pytest.mark.parametrize("kind", kinds())
def test_no_step_of_any_program_is_ever_told(path: Path, kind: Kind) -> None:
    n_steps = 100 if kind.change is change_betas else 400  # torch itself overflows later
    assert take_steps(path, kind, n_steps, (23, 13), seed=1) == AuditCounts(n_steps, 0)


@needs_vectors
@pytest.mark.parametrize("program", ["single", "foreach", "fused"])
def test_elements_that_torch_takes_one_at_a_time_are_not_told(path: Path, program: str) -> None:
    native = "float32" if program == "fused" else "bfloat16"
    options = {"fused": True} if program == "fused" else {"foreach": program == "foreach"}
    with threads(2):
        kind = Kind("Adam", native, {"weight_decay": 0.1, **options})
        assert take_steps(path, kind, 5, (1031, 67)) == AuditCounts(5, 0)


def run_with(
    alien: Alien | None, path: Path, seed: int, *, n_steps: int = N_STEPS, **options: object
) -> int:
    """Train, with something planted at a random step; return the first step that is wrong."""
    random = np.random.default_rng(seed)
    planted = int(random.integers(2, n_steps - 2))
    loop = Loop()
    options = {"memory_bytes": TINY_MEMORY, **options}
    with Recorder(path, loop.optimizer, parameter=loop.weight, **options) as recorder:
        training = Training(loop, recorder, random)
        for step in range(1, n_steps + 1):
            training.take_step()
            if alien is not None and step == planted:
                alien.plant(training)
    return planted + (alien.after if alien is not None else 0)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", ALIENS)
def test_what_no_step_made_is_found_at_its_step(path: Path, name: str) -> None:
    alien, n_steps = ALIENS[name], 13
    for seed in (1, 12):  # after steps 6 and 7, of which one is at the end of a block
        found: list[AuditFinding] = []
        options = {"overwrite": True, "audit": found.append}
        first = run_with(alien, path, seed, n_steps=n_steps, **options)
        assert found[0].step == first
        assert found[0].variable == alien.variable
        assert found[0].code == alien.code
        assert {one.code for one in found} == {one.code for one in check(path).findings}
        assert found[0].recorded != found[0].computed
        counts = audited_steps(path)
        assert counts.checked == n_steps
        assert counts.unexplained >= 1


@pytest.mark.soak
@pytest.mark.parametrize("name", ALIENS)
def test_it_is_found_each_time(path: Path, name: str) -> None:
    for seed in range(100):
        found: list[AuditFinding] = []
        first = run_with(ALIENS[name], path, seed, overwrite=True, audit=found.append)
        assert [found[0].step, found[0].variable] == [first, ALIENS[name].variable]
        assert {one.code for one in found} == {one.code for one in check(path).findings}


def test_without_a_fault_nothing_is_told(path: Path) -> None:
    run_with(None, path, 0, audit="raise")
    assert audited_steps(path) == AuditCounts(N_STEPS, 0)


def test_a_finding_says_where_what_and_how_to_ask_for_more(path: Path) -> None:
    found: list[AuditFinding] = []
    step = run_with(ALIENS["alien write"], path, 5, audit=found.append)
    (finding,) = found
    reader = StoreReader.open(path)
    row = reader.read("W", (step, step + 1), np.array([finding.token]))[0, 0, finding.dim]
    assert decode(row.reshape(1), "bfloat16") == [finding.recorded]
    assert f"thimble-zarr check {path} --steps {step}:{step}" in str(finding)
    result = check(path, steps=f"{step}:{step}")
    assert [one.code for one in result.findings] == ["external-change"]


def train(
    path: Path, steps: list[int], *faults: int, error_after: int = 0, **options: object
) -> Recorder:
    """Train, and flip a bit of the weights after each of some steps; note the steps taken."""
    loop = Loop()
    options = {"memory_bytes": TINY_MEMORY, **options}
    with Recorder(path, loop.optimizer, parameter=loop.weight, **options) as recorder:
        training = Training(loop, recorder, np.random.default_rng(0))
        for step in range(1, N_STEPS + 1):
            training.take_step()
            steps.append(step)
            if step in faults:
                training.flip_live("W", 12)
            if step == error_after:
                raise ZeroDivisionError
    return recorder


def test_a_finding_is_raised_within_a_block_and_nothing_is_lost(path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(AuditError, match="step 7 does not follow from the row before"):
        train(path, steps, 6, audit="raise")
    assert 7 <= steps[-1] <= 7 + 2 * BLOCK
    reader = StoreReader.open(path)
    assert reader.commit.complete
    assert reader.n_rows == steps[-1] + 1


def test_a_row_may_be_audited_before_its_block_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the writer thread is busy, for as long as that may be."""
    steps: list[int] = []
    gate, commit_block = threading.Event(), StoreWriter.commit_block

    def wait(*given: object, **options: object) -> None:
        gate.wait(20)  # which it need not
        commit_block(*given, **options)

    monkeypatch.setattr(StoreWriter, "commit_block", wait)
    close = Recorder._close
    monkeypatch.setattr(Recorder, "_close", lambda recorder: (gate.set(), close(recorder)))
    with pytest.raises(AuditError, match="step 7 does not follow from the row before"):
        train(path, steps, 6, audit="raise", audit_every_step=True)
    assert steps[-1] == 7
    assert audited_steps(path) == AuditCounts(7, 1)
    spent = StoreReader.open(path).read_history().overhead
    assert all(of.audit_s > 0 for of in spent.values())


@pytest.mark.parametrize("name", [name for name, alien in ALIENS.items() if alien.after])
def test_what_is_found_at_the_next_step_has_the_name_that_check_gives_it(
    path: Path, name: str
) -> None:
    found: list[AuditFinding] = []
    options = {"audit": found.append, "audit_every_step": True}
    first = run_with(ALIENS[name], path, 1, **options)
    assert [(one.step, one.code) for one in found] == [(first, ALIENS[name].code)]
    assert {one.code for one in found} == {one.code for one in check(path).findings}


def test_every_step_is_audited_once_however_blocks_end(path: Path) -> None:
    loop = Loop()
    options = {"memory_bytes": TINY_MEMORY, "audit": "raise", "audit_every_step": True}
    for n_steps in (5, 1, 10):
        with Recorder(
            path, loop.optimizer, parameter=loop.weight, resume=True, **options
        ) as recorder:
            for step in range(n_steps):
                loop.step()
                if step % 3 == 1:
                    recorder.flush()
    assert audited_steps(path) == AuditCounts(16, 0)


@pytest.mark.parametrize("options", [{}, {"audit": "warn", "keep": "keyframes"}])
def test_to_audit_every_step_takes_an_audit_and_whole_rows(path: Path, options: dict) -> None:
    loop = Loop()
    with pytest.raises(ConfigError, match="audit_every_step"):
        Recorder(path, loop.optimizer, parameter=loop.weight, audit_every_step=True, **options)
    assert not path.exists()


def test_training_may_go_on_after_it(path: Path) -> None:
    loop, n_raised = Loop(), 0
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY, audit="raise"
    ) as recorder:
        training = Training(loop, recorder, np.random.default_rng(0))
        while recorder.step < N_STEPS:
            try:
                training.take_step()
            except AuditError:
                n_raised += 1
                continue
            if recorder.step in (6, 20):
                training.flip_live("W", 12)
    assert n_raised == 1
    assert StoreReader.open(path).n_rows == N_STEPS + 1
    assert audited_steps(path) == AuditCounts(N_STEPS, 2)


def test_what_the_last_block_has_is_raised_when_the_recorder_closes(path: Path) -> None:
    loop = Loop()
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight, audit="raise")
    loop.step()
    loop.weight.data[3, 2] += 1
    loop.step()
    with pytest.raises(AuditError, match="token 3, dim 2"):
        recorder.close()
    recorder.close()
    assert StoreReader.open(path).commit.complete


def test_an_error_of_training_stays_what_it_was(path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        train(path, [], 6, audit="raise", error_after=7)
    assert "step 7 does not follow" in raised.value.__notes__[0]
    assert StoreReader.open(path).n_rows == 8


def test_a_warning_is_given_once_and_the_rest_is_counted(path: Path) -> None:
    with pytest.warns(UserWarning, match="later steps are counted") as warned:
        recorder = train(path, [], 10, 20, 30, 40, audit="warn")
    assert len(warned) == 1
    assert audited_steps(path) == AuditCounts(N_STEPS, 4)
    assert recorder.audited == AuditCounts(N_STEPS, 4)


def test_a_function_is_called_in_the_writer_thread_when_the_step_is_committed(path: Path) -> None:
    calls = []

    def told(finding: AuditFinding) -> None:
        name = threading.current_thread().name
        calls.append((name, finding.step < StoreReader.open(path).n_rows))

    run_with(ALIENS["bit of W"], path, 0, audit=told)
    assert [(name.startswith("thimble-zarr-writer"), safe) for name, safe in calls] == [
        (True, True)
    ]


def test_a_function_that_fails_is_told_of_and_the_recording_goes_on(path: Path) -> None:
    def told(finding: AuditFinding) -> None:
        raise KeyError("no such channel")

    with pytest.raises(AuditError, match="no such channel") as raised:
        run_with(ALIENS["bit of W"], path, 0, audit=told)
    assert isinstance(raised.value.__cause__, KeyError)
    assert StoreReader.open(path).commit.complete


def test_an_audit_that_fails_ends_and_the_recording_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(audit_module.ParameterAudit, "check", fail)
    with pytest.warns(UserWarning, match="the audit of .* stopped .* a mistake of ours") as warned:
        run_with(None, path, 0, audit="raise")
    assert len(warned) == 1
    assert StoreReader.open(path).n_rows == N_STEPS + 1
    assert audited_steps(path) == AuditCounts()


@pytest.mark.parametrize("every_step", [1, 3, BLOCK])
def test_flushes_change_nothing(path: Path, every_step: int) -> None:
    found: list[AuditFinding] = []
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY, audit=found.append
    ) as recorder:
        for step in range(1, N_STEPS + 1):
            if step in (2 * BLOCK, 5 * BLOCK + 1):
                loop.weight.data[3, 2] += 1
            loop.optimizer.zero_grad()
            loop.step()
            if step % every_step == 0:
                recorder.flush()
    assert [finding.step for finding in found] == [2 * BLOCK, 5 * BLOCK + 1]
    assert audited_steps(path) == AuditCounts(N_STEPS, 2)


@pytest.mark.parametrize("n_before", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_the_first_step_after_a_resume_is_audited_too(path: Path, n_before: int) -> None:
    loop, options = Loop(), {"memory_bytes": TINY_MEMORY}
    with Recorder(path, loop.optimizer, parameter=loop.weight, **options, audit="raise"):
        for _ in range(n_before):
            loop.step()
    found: list[AuditFinding] = []
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, **options, resume=True, audit=found.append
    ):
        loop.weight.data[3, 2] += 1
        loop.step()
        loop.step()
    assert [(finding.step, finding.token) for finding in found] == [(n_before + 1, 3)]
    assert audited_steps(path) == AuditCounts(n_before + 2, 1)


def test_a_run_may_be_resumed_with_or_without(path: Path) -> None:
    loop = Loop()
    for audit in (None, "raise", None):
        with Recorder(
            path,
            loop.optimizer,
            parameter=loop.weight,
            memory_bytes=TINY_MEMORY,
            resume=True,
            audit=audit,
        ):
            for _ in range(5):
                loop.step()
    # The blocks that one without an audit wrote again still say what was audited in them.
    assert StoreReader.open(path).n_rows == 16


def test_only_steps_whose_row_before_is_recorded_are_taken_again(path: Path) -> None:
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, schedule=every(5), audit="raise"
    ) as recorder:
        for _ in range(N_STEPS):
            loop.step()
    steps = StoreReader.open(path).read_steps()
    assert recorder.audited == AuditCounts(int((np.diff(steps) == 1).sum()), 0)
    assert recorder.audited.checked == N_STEPS // 5


def test_tokens_have_their_ids_and_parameters_their_names(path: Path) -> None:
    loop, found = Loop(), []
    with Recorder(
        path,
        loop.optimizer,
        parameters={"wte.weight": loop.weight, "head.bias": loop.head.bias},
        tokens={"wte.weight": [2, 7, 9]},
        audit=found.append,
    ):
        loop.step()
        loop.weight.data[7, 4] += 1
        loop.weight.data[8, 4] += 1
        loop.step()
        loop.head.bias.data[10] += 1
        loop.step()
    (finding,) = found
    assert (finding.parameter, finding.step) == ("wte.weight", 2)
    assert (finding.token, finding.dim, finding.n_wrong) == (7, 4, {"W": 1})
    reader = StoreReader.open_each(path)[0]
    assert reader.read_history().audits == {0: AuditCounts(3, 2)}


def test_a_skipped_step_changes_nothing(path: Path) -> None:
    loop, found = Loop(), []
    with Recorder(path, loop.optimizer, parameter=loop.weight, audit=found.append) as recorder:
        loop.step()
        loop.optimizer.zero_grad()
        for bias in (0, 1):
            loop.weight.data[1, 1] += bias
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # there is no gradient
                loop.optimizer.step()
        loop.step()
    assert recorder.audited == AuditCounts(4, 1)
    assert [(finding.step, finding.n_wrong) for finding in found] == [(3, {"W": 1})]


def test_what_cannot_be_audited_is_told_once(path: Path) -> None:
    loop = Loop()
    with pytest.warns(UserWarning, match="cannot be audited: grad is not recorded") as warned:
        recorder = Recorder(
            path,
            loop.optimizer,
            parameter=loop.weight,
            variables=["exp_avg", "exp_avg_sq"],
            audit="raise",
        )
    with recorder:
        loop.step()
    assert len(warned) == 1
    assert StoreReader.open(path).read_history().audits == {}


def test_a_parameter_that_is_not_contiguous_is_not_audited(path: Path) -> None:
    weight = nn.Parameter(torch.randn(5, 11).T)
    optimizer = torch.optim.AdamW([weight])
    with pytest.warns(UserWarning, match="not contiguous"):
        Recorder(path, optimizer, parameter=weight, audit="warn").close()


def test_an_unknown_audit_is_refused(path: Path) -> None:
    loop = Loop()
    with pytest.raises(ConfigError, match="audit is 'shout'"):
        Recorder(path, loop.optimizer, parameter=loop.weight, audit="shout")
    assert not path.exists()


def test_what_it_takes_is_noted(path: Path) -> None:
    run_with(None, path, 0, audit="raise")
    spent = StoreReader.open(path).read_history().overhead
    assert all(of.audit_s > 0 for of in spent.values())
    run_with(None, path, 0, overwrite=True)
    spent = StoreReader.open(path).read_history().overhead
    assert not any(of.audit_s for of in spent.values())


def test_a_finding_is_no_reason_to_lose_a_block(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk fails, the error says so."""

    def fail(*given: object, **options: object) -> None:
        raise OSError("no space left")

    loop = Loop()
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight, audit="raise")
    loop.step()
    loop.weight.data[3, 2] += 1
    loop.step()
    monkeypatch.setattr(StoreWriter, "commit_block", fail)
    with pytest.raises(RecordingError, match="no space left") as raised:
        recorder.close()
    assert not isinstance(raised.value, AuditError)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("is_alien", [False, True])
def test_it_takes_no_more_memory_than_planned(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, is_alien: bool
) -> None:
    peaks, check_block = [], audit_module.Audit._check

    def measured(*given: object) -> AuditCounts:
        tracemalloc.start()
        try:
            return check_block(*given)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(audit_module.Audit, "_check", measured)
    weight = nn.Parameter(0.02 * torch.randn(5003, 64))
    optimizer = torch.optim.AdamW([weight], foreach=False)
    with Recorder(path, optimizer, parameter=weight, audit=lambda finding: None) as recorder:
        for _ in range(9):
            weight.grad = torch.randn(5003, 64)
            optimizer.step()
            if is_alien:
                weight.data.mul_(0.9)
    (schema,) = recorder.schemas.values()
    assert recorder.audited == AuditCounts(9, 8 * is_alien)
    row = row_size(schema.shape, schema.dtypes)
    # What torch makes is not seen, beside what NumPy does: three arrays of what it takes at once.
    assert max(peaks) + 3 * 4 * layout.AUDIT_ELEMENTS <= layout.audit_memory_bytes([row])


def test_a_plan_says_what_it_takes() -> None:
    sizes = dict.fromkeys(("W", "grad", "exp_avg", "exp_avg_sq"), 2)
    plans = [
        layout.plan_storage(1001, 10_000, 64, sizes, n_scalars=8, audited=audited)
        for audited in (False, True)
    ]
    assert plans[0].layout == plans[1].layout
    more = plans[1].memory_bytes - plans[0].memory_bytes
    assert more == layout.audit_memory_bytes([layout.RowSize(10_000, 64, sizes)]) < 22e6
