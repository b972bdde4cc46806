"""Optimizers whose step needs the whole parameter: Muon and Adafactor, held against torch."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.documents import ROOT
from tests.support.faults import flip_bit, relabel, rewrite
from thimble_zarr import Recorder, TokenLabels, accounting, check, open_dataset
from thimble_zarr.bits import patterns
from thimble_zarr.errors import ConfigError, SelectionError
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.optim import registry
from thimble_zarr.optim.base import LEARNING_RATE, State
from thimble_zarr.optim.registry import register_optimizer
from thimble_zarr.optim.whole import Whole, processor_of
from thimble_zarr.record.audit.finding import AuditFinding
from thimble_zarr.report import info
from thimble_zarr.report.check_tables import as_text
from thimble_zarr.sources.open import open_recording
from thimble_zarr.store.reader import StoreReader

SHAPE = (11, 5)

WAYS = {
    "Muon": {
        "plain": {},
        "without nesterov": {"nesterov": False, "weight_decay": 0.0, "ns_steps": 3},
        "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.3},
        "other coefficients": {"adjust_lr_fn": "original", "ns_coefficients": (3.0, -3.2, 1.2)},
        "tensor lr": {"lr": torch.tensor(1e-2), "eps": 1e-3},
    },
    "Adafactor": {
        "plain": {},
        "decay": {"foreach": True, "weight_decay": 0.1},
        "maximize": {"maximize": True, "beta2_decay": -0.5, "d": 2.0},
        "epsilons": {"foreach": True, "maximize": True, "eps": (1e-5, 1e-2)},
        "tensor lr": {"lr": torch.tensor(1e-2), "weight_decay": 0.1},
    },
}
"""Options that make torch compute otherwise."""

ALONE = {
    "Muon": "`momentum_buffer`, but not in bfloat16 without `nesterov`",
    "Adafactor": "nothing",
}
"""What is stepped element by element."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def record(
    path: Path,
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = SHAPE,
    n_steps: int = 13,
    **of_recorder: object,
) -> Path:
    generator = torch.Generator().manual_seed(7)
    weight = nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype))
    optimizer = getattr(torch.optim, name)([weight], **copy.deepcopy(dict(options or {})))
    with Recorder(path, optimizer, parameter=weight, **of_recorder):
        for _ in range(n_steps):
            weight.grad = torch.randn(shape, generator=generator).to(dtype)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
    return path


def labels() -> TokenLabels:
    return TokenLabels.from_counts(np.arange(11) % 3, [f" t{token}" for token in range(11)])


def embedding_run(path: Path, name: str, **options: object) -> Path:
    """Has tokens, 4 of which are dead."""
    model = nn.Embedding(*SHAPE)
    generator = torch.Generator().manual_seed(7)
    optimizer = getattr(torch.optim, name)(model.parameters())
    given = {"parameter": model.weight, "model": model, **options}
    with Recorder(path, optimizer, **given):
        for _ in range(13):
            model.weight.grad = torch.randn(SHAPE, generator=generator)
            optimizer.step()
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: embedding_run(folder / name, name, labels=labels()) for name in WAYS}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WAYS)
def test_whole_steps_are_replayed_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for way, options in WAYS[name].items():
        path = record(tmp_path / f"{way}.zarr", name, options, dtype=dtype, n_steps=7)
        names = [*StoreReader.open(path).schema.optimizer.variables]
        names.remove("grad")
        result = check(path)
        assert result.verdict.startswith("HOLDS to the bit: replayed by torch, all 385 values each")
        (found,) = result
        assert [*(found.replay or ())] == names


@pytest.mark.parametrize("name", WAYS)
def test_it_is_in_the_table(name: str) -> None:
    foreach = any("foreach" in options for options in WAYS[name].values())
    programs = "single, foreach" if foreach else "single"
    row = f"| `{name}` | {programs} | {ALONE[name]} | {'; '.join(WAYS[name])} |"
    assert row in (ROOT / "docs/exactness.md").read_text(encoding="utf-8").splitlines(), row


def test_vectors_and_other_shapes_are_too(tmp_path: Path) -> None:
    for number, shape in enumerate([(), (11,), (5, 3, 4)]):
        path = record(tmp_path / f"{number}.zarr", "Adafactor", shape=shape)
        assert check(path).verdict.startswith("HOLDS to the bit")
        states = {"variance"} if len(shape) < 2 else {"row_var", "col_var"}
        assert states == {*open_dataset(path).data_vars} & {"variance", "row_var", "col_var"}
    path = record(tmp_path / "wide.zarr", "Muon", shape=(7, 19), dtype=torch.bfloat16)
    assert check(path).verdict.startswith("HOLDS to the bit")


def test_sums_are_taken_by_as_many_threads_as_they_were(tmp_path: Path) -> None:
    how = {"shape": (997, 64), "n_steps": 2}
    path = record(tmp_path / "run.zarr", "Muon", {"nesterov": False}, **how)
    n_threads = StoreReader.open(path).schema.n_threads
    assert n_threads == torch.get_num_threads()
    assert check(path).verdict.startswith("HOLDS to the bit")
    assert torch.get_num_threads() == n_threads


@pytest.mark.filterwarnings("ignore:no gradient")
@pytest.mark.parametrize("name", WAYS)
def test_skipped_steps_and_a_start_in_the_middle(name: str, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    optimizer = getattr(torch.optim, name)([weight])
    for number, gone in enumerate([(1, 4), (2,)]):  # the second begins where the first ended
        with Recorder(tmp_path / f"{number}.zarr", optimizer, parameter=weight):
            for step in range(1, 7):
                weight.grad = None if step in gone else weight.detach().cos()
                optimizer.step()
        verdict = check(tmp_path / f"{number}.zarr").verdict
        assert verdict.startswith("HOLDS to the bit: replayed by torch, all 330 values each")


def test_factors_are_recorded_as_they_enter_the_step(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    optimizer, held = torch.optim.Adafactor([weight]), []
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        for _ in range(3):
            weight.grad = weight.detach().cos()
            optimizer.step()
            held.append({name: of.clone() for name, of in optimizer.state[weight].items()})
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight, resume=True):
        weight.grad = weight.detach().sin()
        optimizer.step()
    ds = open_dataset(tmp_path / "run.zarr")
    for name in ("row_var", "col_var"):
        assert not ds[name][0].any()
        for step, state in enumerate(held, 1):
            np.testing.assert_array_equal(ds[name][step], state[name].expand(SHAPE))
    assert np.isclose(ds["eps1"][1], torch.finfo(torch.float32).eps)
    assert check(tmp_path / "run.zarr").holds


@pytest.mark.parametrize("foreach", [False, True])
def test_parameters_of_other_dtypes_bring_their_epsilon(foreach: bool, tmp_path: Path) -> None:
    """torch takes that of one parameter for all: of which depends on the implementation."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    weights = {str(kind)[6:]: nn.Parameter(torch.ones(SHAPE).to(kind)) for kind in kinds}
    optimizer = torch.optim.Adafactor(weights.values(), foreach=foreach, lr=0.1)
    with Recorder(tmp_path / "run.zarr", optimizer, parameters=weights):
        for step in range(3):
            for weight in weights.values():
                weight.grad = torch.full_like(weight, 0.1 * (step + 1))
                weight.grad[3, 2] = 1.0
            optimizer.step()
    assert check(tmp_path / "run.zarr").holds


def test_of_a_selection_only_the_momentum_of_muon_is_checked(runs: dict[str, Path]) -> None:
    verdict = check(runs["Muon"], tokens="dead").verdict
    assert verdict == (
        "HOLDS as far as it can be checked: replayed by torch, all 260 values of momentum_buffer "
        "follow from the row before. W was not replayed: a step of Muon needs the whole parameter, "
        "and only 20 of 55 elements are selected: select all of it (--tokens all, or beside a "
        "part: --tokens dead,all)."
    )
    verdict = check(runs["Adafactor"], tokens="dead").verdict
    assert verdict.startswith("HOLDS as far as it can be checked: all 260 weights are finite")
    assert "W, row_var and col_var were not replayed: a step of Adafactor needs" in verdict
    for name, path in runs.items():
        (whole,), dead, beside = check(path), *check(path, tokens="dead,all")
        assert whole.subset == "all"  # by default, though it is known which are dead
        for result in (whole, dead, beside):
            assert result.verdict.text.startswith("HOLDS to the bit"), name
        assert dead.n_tokens == 4
        with pytest.raises(ConfigError, match=f"no formula of {name} is known"):
            check(path, replay=False)


def test_a_fault_of_a_selection_is_found(runs: dict[str, Path], tmp_path: Path) -> None:
    def fault(bits: dict, scalars: dict) -> None:
        flip_bit(bits["momentum_buffer"], (4, 3, 2), 22)

    rewrite(runs["Muon"], tmp_path / "f.zarr", fault)
    (result,) = check(tmp_path / "f.zarr", tokens=[1, 3])
    assert not result.holds
    (finding,) = result.findings
    assert (finding.code, finding.step, finding.token, finding.dim) == ("bit-flip", 4, 3, 2)
    assert check(tmp_path / "f.zarr", tokens=[1, 4]).holds
    parts = [of for path in runs.values() for of in check(path, tokens="dead").parameters]
    text = as_text(parts)
    assert text.count("HOLDS in part\n") == 2
    assert "W was not replayed: a step of Muon" in " ".join(text.split())
    assert "were not replayed: a step of Adafactor" in " ".join(text.split())
    readers = open_recording(runs["Muon"])
    assert "Muon, single; a step needs the whole" in info.as_text(runs["Muon"], readers, readers)


@pytest.mark.parametrize("name", WAYS)
def test_a_fault_is_explained_by_the_whole_parameter_where_subsets_are_all_of_it(
    name: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    def fault(bits: dict, scalars: dict) -> None:
        bits["W"][6, 2] += 0.5

    rewrite(runs[name], tmp_path / "f.zarr", fault)
    *_, result = check(tmp_path / "f.zarr", tokens="dead,live")
    (finding,) = result.findings
    assert (finding.code, finding.step, finding.token) == ("torn-row", 6, 2)


@pytest.mark.parametrize("name", WAYS)
def test_states_that_were_not_recorded_leave_no_formula_to_check(name: str, tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", name, n_steps=2, variables=("W", "grad"))
    with pytest.raises(SelectionError, match=r"or with all of them$"):
        check(path)


def test_of_a_part_that_is_recorded_too(tmp_path: Path) -> None:
    path = embedding_run(tmp_path / "muon.zarr", "Muon", tokens=[1, 4, 7])
    verdict = check(path).verdict
    assert "all 195 values of momentum_buffer follow" in verdict
    assert "only 15 of 55 elements are recorded: record all of it (without tokens=)" in verdict
    path = embedding_run(tmp_path / "adafactor.zarr", "Adafactor", tokens=[1, 4, 7])
    assert "were not replayed: " in check(path).verdict


def test_torch_normalizes_the_momentum_where_it_is_no_copy(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", "Muon", {"nesterov": False}, dtype=torch.bfloat16)
    ds = open_dataset(path)
    bfloat16 = [torch.tensor(ds[of].values).bfloat16() for of in ("momentum_buffer", "grad")]
    lerped = bfloat16[0][4].lerp(bfloat16[1][5], 1 - 0.95)
    is_fixed = torch.equal(lerped, bfloat16[0][5])  # pytorch#194664
    assert is_fixed or abs(float(bfloat16[0][5].float().norm()) - 1) < 0.01
    verdict = check(path, tokens=[1, 2]).verdict if ds.token.size else ""
    assert "W and momentum_buffer were not replayed" in verdict


def test_a_dataset_has_what_the_replay_leaves_of_all_and_of_no_part(
    runs: dict[str, Path],
) -> None:
    for path in runs.values():
        ds = open_dataset(path)
        assert not ds.unexplained[1:].any()
        for part in (ds.sel(token=[1, 3]), ds.isel(dim=slice(0, 4)), ds.isel(token=[0] * 11)):
            with pytest.raises(SelectionError, match="needs the whole parameter"):
                part.unexplained.compute()
        table = accounting(ds.sel(token=[3, 1]), formula=False)
        assert "needs the whole parameter" in table.attrs["not_replayed"]
        shuffled = accounting(ds.isel(token=[*range(10, -1, -1)]), formula=False)
        assert not shuffled.n_different.any()
        assert "W" in shuffled.recurrence


def test_switches_of_libraries_are_part_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    here = processor_of(None)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert processor_of(None) == f"{here}, ONEDNN_MAX_CPU_ISA AVX2"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    torch._C._set_mkldnn_enabled(False)
    try:
        assert processor_of(None) == f"{here}, without oneDNN"
    finally:
        torch._C._set_mkldnn_enabled(True)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert processor_of(None) == f"{here}, matmul.fp32_precision bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision
    assert processor_of(None) == here


def test_where_other_sums_are_possible_bits_are_not_expected(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def another(bits: dict, scalars: dict) -> None:
        bits["W"][4:] = np.nextafter(bits["W"][4:], np.float32(9))

    rewrite(runs["Muon"], tmp_path / "off.zarr", another)
    assert not check(tmp_path / "off.zarr").holds
    told = {"optimizer": {"processor": "another"}, "software": {"torch": "2.9.1"}}
    for field, of in told.items():
        relabel(tmp_path / "off.zarr", tmp_path / f"{field}.zarr", **{field: of})
        verdict = check(tmp_path / f"{field}.zarr").verdict
        assert verdict.startswith("HOLDS as far as it can be checked: all 715 weights are finite")
        assert "all 715 values of momentum_buffer follow from the row before" in verdict
        assert "Of 715 values in each array the replay gives other bits for " in verdict
        assert f"recorded {'on another' if field == 'optimizer' else 'with torch 2.9.1'}" in verdict

    for name, factor in {"near": 1 + 2**-23, "far": 1 + 2**-12}.items():

        def off(bits: dict, scalars: dict, factor: float = factor) -> None:
            bits["momentum_buffer"][4, 3, 2] *= np.float32(factor)

        rewrite(runs["Muon"], tmp_path / f"{name}.zarr", off)
        relabel(tmp_path / f"{name}.zarr", tmp_path / f"{name}-there.zarr", **told)
        verdict = check(tmp_path / f"{name}-there.zarr").verdict
        assert ("of momentum_buffer differ" in verdict) == (name == "far")
        assert verdict.startswith("HOLDS") == (name == "near")


@pytest.mark.parametrize("name", WAYS)
def test_faults_are_found_and_named(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    variables = StoreReader.open(runs[name]).schema.optimizer.variables

    def found(fault) -> object:
        rewrite(runs[name], tmp_path / "f.zarr", fault)
        result = check(tmp_path / "f.zarr")
        shutil.rmtree(tmp_path / "f.zarr")
        assert not result.holds
        return result.findings[0]

    for variable in variables:
        finding = found(lambda bits, _, of=variable: flip_bit(bits[of], (4, 8, 3), 22))
        assert (finding.code, finding.variable, finding.step) == ("bit-flip", variable, 4)
        assert (finding.token, finding.dim) == (8, 3)

    def scale(bits: dict, scalars: dict) -> None:
        bits["grad"][1:] *= 1024

    def change(bits: dict, scalars: dict) -> None:
        bits["W"][6, 2] += 0.5

    finding = found(scale)
    assert finding.code == "scaled-gradient"
    assert "1024 times" in finding.message
    assert found(change).code == "torn-row"


@pytest.mark.parametrize("name", WAYS)
def test_a_change_from_outside_is_found_and_named(name: str, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    optimizer = getattr(torch.optim, name)([weight])
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        for step in range(7):
            weight.grad = weight.detach().sin()
            optimizer.step()
            if step == 3:
                weight.data[2] += 0.5
    result = check(tmp_path / "run.zarr")
    (finding,) = result.findings
    assert (finding.code, finding.step) == ("external-change", 5)


class Normed(torch.optim.Optimizer):
    """Steps by a gradient of norm 1, and keeps how long each column's have been."""

    def __init__(self, params, lr=0.1, flip=False) -> None:
        super().__init__(params, {"lr": lr, "flip": flip})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                state, grad = self.state[weight], weight.grad
                kept = state.setdefault("lengths", torch.zeros_like(weight[:1]))
                kept += grad.norm(dim=0, keepdim=True)
                sign = -1 if group["flip"] else 1
                weight -= sign * group["lr"] * grad / grad.norm() / kept


@dataclass(frozen=True, kw_only=True)
class NormedReplayed(Whole):
    CLASSES = (f"{Normed.__module__}.Normed",)
    STATES = (State("lengths", "lengths after the step", single_along=0),)
    SCALARS = (LEARNING_RATE,)
    STEP_KEY = None

    flip: bool = False

    @classmethod
    def choices(cls, group):
        return {"flip": group["flip"]}

    def make(self, weight):
        return Normed([weight], flip=self.flip)


def test_anybody_can_tell_how_to_take_whole_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "OTHERS", dict(registry.OTHERS))
    register_optimizer(NormedReplayed)
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    optimizer = Normed([weight], flip=True)
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        for _ in range(13):
            weight.grad = weight.detach().sin()
            optimizer.step()
    ds = open_dataset(tmp_path / "run.zarr")
    assert (ds.lengths[1:] == ds.lengths[1:, :1].values).all()
    assert check(tmp_path / "run.zarr").verdict.startswith("HOLDS to the bit: replayed by torch")

    def off(bits: dict, scalars: dict) -> None:
        bits["lengths"][4, 3, 2] *= 1.5

    rewrite(tmp_path / "run.zarr", tmp_path / "off.zarr", off)
    assert not check(tmp_path / "off.zarr").holds


def test_muon_beside_adamw_is_recorded_by_two(tmp_path: Path) -> None:
    model = nn.Linear(5, 11)
    muon = torch.optim.Muon([model.weight])
    adamw = torch.optim.AdamW([model.bias])
    with (
        Recorder(tmp_path / "muon.zarr", muon, parameters=["weight"], model=model),
        Recorder(tmp_path / "adamw.zarr", adamw, parameters=["bias"], model=model),
    ):
        for step in range(5):
            model(torch.ones(3, 5) * step).square().sum().backward()
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad()
    for name in ("muon", "adamw"):
        assert check(tmp_path / f"{name}.zarr").verdict.startswith("HOLDS to the bit")


def test_of_a_gradient_that_is_added_in_another_order_a_recording_warns(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(211, 13))
    optimizer = torch.optim.Adafactor([weight])
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        weight.grad = torch.ones(13, 211).t()
        with pytest.warns(UserWarning, match="is not contiguous. A step of Adafactor may add"):
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, its in WAYS.items() for way in its]
)
def test_a_recording_takes_its_steps_again(
    name: str, way: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In the writer thread, all of them or those that training did not copy."""
    rows = {}
    for keep in ("all", "keyframes"):
        path = tmp_path / f"{keep}.zarr"
        record(path, name, WAYS[name][way], dtype=dtype, audit="raise", keep=keep)
        reader = StoreReader.open(path)
        assert sum(reader.read_history().audits.values(), AuditCounts()) == AuditCounts(13, 0)
        rows[keep] = {of: reader.read(of, (0, 14)) for of in reader.schema.dtypes}
    for of, bits in rows["all"].items():
        assert (patterns(bits) == patterns(rows["keyframes"][of])).all()
    assert "12 of these rows were not copied" in check(tmp_path / "keyframes.zarr").verdict


@pytest.mark.parametrize("name", WAYS)
def test_a_recording_finds_what_no_step_made(name: str, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(SHAPE))
    optimizer = getattr(torch.optim, name)([weight])
    found: list[AuditFinding] = []
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight, audit=found.append):
        for step in range(1, 8):
            weight.grad = weight.detach().cos() + torch.arange(55).reshape(SHAPE) / 55
            optimizer.step()
            if step == 4:
                weight.data[7, 2] += 1
    (finding,) = found
    assert (finding.step, finding.code) == (5, "external-change")


def test_of_a_part_a_recording_takes_no_step_again(tmp_path: Path) -> None:
    why = "a step of Muon needs the whole parameter, and only 2 of 11 tokens are recorded"
    with pytest.warns(UserWarning, match=why):
        record(tmp_path / "run.zarr", "Muon", audit="raise", tokens=[2, 3])
