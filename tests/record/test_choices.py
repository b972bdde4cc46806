"""Which variables and which tokens are recorded, and all choices together."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import xarray as xr
import zarr
from click.testing import CliRunner, Result
from torch import nn

from tests.support.draws import LANE_SENSITIVE, draw, gradient, needs_vectors
from tests.support.faults import Arrays, flip_bit, relabel, rewrite
from tests.support.runs import N_TOKENS, TINY_MEMORY, record, token_labels
from tests.support.tiny import SMALL, random_data
from thimble_zarr import (
    Recorder,
    accounting,
    check,
    every,
    open_dataset,
    open_datasets,
    open_datatree,
    windows,
)
from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.findings import find_causes
from thimble_zarr.cli.main import cli
from thimble_zarr.cli.train import _next_command
from thimble_zarr.errors import ConfigError, DamagedStoreError, SelectionError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.plan import plan_run
from thimble_zarr.experiment.trainer import train
from thimble_zarr.sources.exporting import export_notebook
from thimble_zarr.store.reader import StoreReader

STORED = ("W", "grad", "exp_avg", "exp_avg_sq")

TOKENS = [10, 2, 7, 3]
"""Three live ones and a dead one, in no order."""


def run(*args: object) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- variables -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variables") / "weights.zarr"
    record(path, recorder_options={"variables": ("grad", "W")})
    return path


@pytest.fixture(scope="module")
def without_gradient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("variables") / "formula.zarr"
    record(path, recorder_options={"variables": ("exp_avg", "exp_avg_sq")})
    return path


@pytest.mark.parametrize(
    ("fixture", "stored", "derived"),
    [
        (
            "without_moments",
            {"W", "grad"},
            {"delta_W", "decay", "adam_decay", "moved", "ulp", "displacement_ulp"},
        ),
        (
            "without_gradient",
            {"W", "exp_avg", "exp_avg_sq"},
            {"delta_W", "decay", "adam_decay", "moved", "ulp", "displacement_ulp"}
            | {"update", "residual", "adam_update", "adam_residual", "stalled"}
            | {"m_hat", "v_hat"},
        ),
    ],
)
def test_only_these_are_stored_and_what_follows_from_them(
    request: pytest.FixtureRequest,
    toy_path: Path,
    fixture: str,
    stored: set[str],
    derived: set[str],
) -> None:
    path = request.getfixturevalue(fixture)
    assert {name for name in STORED if (path / name).exists()} == stored
    ds, whole = open_dataset(path), open_dataset(toy_path)
    big = {name for name, variable in ds.data_vars.items() if variable.ndim == 3}
    assert big == stored | derived
    for name in [*sorted(big), "freeze_step", "loss"]:
        np.testing.assert_array_equal(ds[name], whole[name])


def test_what_is_not_there_says_why_and_how_to_have_it(without_moments: Path) -> None:
    ds = open_dataset(without_moments).sel(token=[1, 2])  # selecting keeps the explanation
    assert ds.attrs["not_recorded"] == (
        "exp_avg and exp_avg_sq were not recorded; record with "
        'variables=("W", "grad", "exp_avg", "exp_avg_sq"), or with all of them'
    )
    with pytest.raises(SelectionError, match=r"neither AdamW's formula nor the replay .*exp_avg"):
        accounting(ds)
    assert not hasattr(ds, "rounding")
    assert ds.compute().delta_W.shape == (14, 2, 5)


def test_without_the_moments_there_is_nothing_to_check(without_moments: Path) -> None:
    result = run("check", without_moments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: neither AdamW's formula nor the replay can be checked")
    assert len(result.stderr.splitlines()) == 1


def test_without_the_gradient_the_formula_is_checked(
    without_gradient: Path, toy_path: Path
) -> None:
    ds = open_dataset(without_gradient)
    with pytest.raises(SelectionError, match=r"cannot be replayed: grad was .*replay=False"):
        accounting(ds)
    assert accounting(ds, replay=False).identical(accounting(open_dataset(toy_path), replay=False))
    result = run("check", without_gradient, "--tokens", "all")
    assert result.exit_code == 0
    assert "\nChecked  AdamW's formula, without a replay: grad was not recorded" in result.stdout
    assert "HOLDS: all" in result.stdout


def test_without_gradient_and_formula_there_is_nothing_to_check(without_gradient: Path) -> None:
    result = run("check", without_gradient, "--no-formula")
    assert result.exit_code == 2
    assert "the steps cannot be replayed: grad was not recorded" in result.stderr
    assert "can be checked, without formula=False (--no-formula)" in result.stderr


def test_a_wrong_row_fails_the_formula_too(without_gradient: Path, tmp_path: Path) -> None:
    def change(bits: Arrays, scalars: Arrays) -> None:
        bits["W"][5] = bits["W"][3]

    rewrite(without_gradient, tmp_path / "run.zarr", change)
    result = run("check", tmp_path / "run.zarr", "--tokens", "all")
    assert result.exit_code == 1
    assert "first at step 5" in result.stdout


def test_the_formula_of_amsgrad_needs_the_maximum(tmp_path: Path) -> None:
    options = {"variables": ("W", "exp_avg", "exp_avg_sq")}
    record(tmp_path / "run.zarr", recorder_options=options, amsgrad=True)
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds.attrs["not_recorded"].startswith("grad and max_exp_avg_sq were not recorded")
    assert "stalled" not in ds


@pytest.mark.parametrize("variables", [("W", "gradient"), ("max_exp_avg_sq",), "exp"])
def test_variables_that_there_are_not_are_refused(tmp_path: Path, variables: object) -> None:
    with pytest.raises(ConfigError, match=r"there is no variable .* choose among W, grad"):
        record(tmp_path / "run.zarr", recorder_options={"variables": variables})
    assert not list(tmp_path.iterdir())


# --- tokens --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four tokens, never to be written to."""
    path = tmp_path_factory.mktemp("tokens") / "run.zarr"
    record(path, recorder_options={"tokens": TOKENS})
    return path


def test_it_is_the_full_store_at_those_tokens(some: Path, toy_path: Path) -> None:
    ds, whole = open_dataset(some), open_dataset(toy_path)
    same = whole.sel(token=sorted(TOKENS))
    xr.testing.assert_equal(ds.compute(), same.compute())
    assert ds.text.values.tolist() == [" t2", " t3", " t7", " t10"]
    table = accounting(ds)
    assert table.identical(accounting(same))
    assert int(table.n_different.sum()) == 0
    assert accounting(ds.sel(token=ds.dead)).identical(accounting(whole.sel(token=[2, 3])))


@pytest.mark.parametrize(
    "tokens",
    [np.isin(np.arange(N_TOKENS), TOKENS), torch.tensor(TOKENS), [*TOKENS, 2]],
    ids=["mask", "tensor", "twice"],
)
def test_tokens_are_ids_or_a_mask(some: Path, tmp_path: Path, tokens: object) -> None:
    record(tmp_path / "run.zarr", recorder_options={"tokens": tokens})
    ds, same = open_dataset(tmp_path / "run.zarr"), open_dataset(some)
    assert ds.token.equals(same.token)
    assert ds.W.equals(same.W)


def test_others_read_the_ids(some: Path) -> None:
    on_disk = [7, 10, 2, 3]  # live ones before dead ones
    assert sorted(TOKENS) == sorted(on_disk)
    assert xr.open_zarr(some).token.values.tolist() == on_disk
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(some / "token")}}
    ids = tensorstore.open(spec, read=True).result().read().result()
    assert ids.tolist() == on_disk


def test_the_command_line_means_ids(some: Path) -> None:
    result = run("check", some, "--tokens", "7,10", "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["tokens"] == {"subset": "7,10", "n": 2}
    assert run("check", some, "--tokens", "dead,all").exit_code == 0
    missing = run("check", some, "--tokens", "5")
    assert missing.exit_code == 2
    assert "token 5 is not in this run, which has 4 of the tokens 2 to 10" in missing.stderr
    shown = run("info", some).stdout
    assert "4 x 5 of 11 tokens" in shown
    assert "2 live, 2 dead" in shown


def test_a_fault_is_named_by_the_id_of_its_token(some: Path, tmp_path: Path) -> None:
    def change(bits: Arrays, scalars: Arrays) -> None:
        flip_bit(bits["W"], (5, 2, 3), 2)

    rewrite(some, tmp_path / "run.zarr", change)
    ds = open_dataset(tmp_path / "run.zarr")
    table = accounting(ds)
    assert int(table.first_token.sel(step=5, recurrence="W")) == 7
    (finding,) = find_causes(selected(ds), table)
    assert (finding.code, finding.step, finding.token, finding.dim) == ("bit-flip", 5, 7, 3)
    assert "token 7, dim 3" in finding.message
    assert not accounting(ds.sel(token=[2, 3, 10])).n_beyond.any()


def test_permuted_tokens_are_named_by_their_ids(some: Path, tmp_path: Path) -> None:
    def change(bits: Arrays, scalars: Arrays) -> None:
        bits["W"][5] = bits["W"][5][[1, 0, 3, 2]]

    rewrite(some, tmp_path / "run.zarr", change)
    ds = open_dataset(tmp_path / "run.zarr")
    finding = find_causes(selected(ds), accounting(ds))[0]
    assert (finding.code, finding.token) == ("permuted-tokens", 2)
    assert "of token 2 are those of token 3" in finding.message


@needs_vectors
@pytest.mark.parametrize("name", LANE_SENSITIVE)
def test_the_replay_knows_where_the_tokens_were(tmp_path: Path, name: str) -> None:
    """Programs that round by position: without the ids the replay would give other bits."""
    cell, shape = LANE_SENSITIVE[name], (11, 13)
    generator = torch.Generator().manual_seed(7)
    weight = nn.Parameter(draw(shape, generator, size=0.02).to(cell.dtype))
    optimizer = cell.optimizer([weight], **{"lr": 1e-2, **cell.options})
    path = tmp_path / "run.zarr"
    with Recorder(path, optimizer, parameter=weight, tokens=[3, 8, 9, 10]):
        for _ in range(11):
            weight.grad = gradient(shape, generator).to(cell.dtype)
            optimizer.step()
    assert n_different(path) == 0
    relabel(path, tmp_path / "alone.zarr", whole_tokens=None)
    assert n_different(tmp_path / "alone.zarr") > 0


def n_different(path: Path) -> int:
    """Return how many bits differ from what torch's own program makes of the row before."""
    (of_all,) = check(path, replay="torch", tokens="all")
    return int(of_all.numbers["n_different"].sum())


class Small(nn.Module):
    """Parameters of rank 0 to 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(11, 5)
        self.up = nn.Parameter(torch.randn(7, 3))
        self.norm = nn.Parameter(torch.randn(13))
        self.image = nn.Parameter(torch.randn(5, 2, 3, 2))
        self.scale = nn.Parameter(torch.randn(()))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()


def record_small(path: Path, **options: object) -> xr.DataTree:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"model": model, "memory_bytes": TINY_MEMORY, **options}
    with Recorder(path, optimizer, parameters="*", **options):
        for _ in range(13):
            model.step(optimizer)
    return open_datatree(path)


CHOSEN: Mapping[str, list[int]] = {
    "wte.weight": [2, 10],
    "up": [0, 6],
    "norm": [4, 5, 12],
    "image": [3],
}


def test_several_parameters_with_every_choice(tmp_path: Path) -> None:
    labels = {"wte.weight": token_labels()}
    whole = record_small(tmp_path / "whole.zarr", labels=labels)
    chosen = record_small(
        tmp_path / "run.zarr",
        labels=labels,
        variables=("W", "exp_avg", "exp_avg_sq"),
        tokens=CHOSEN,
        schedule=every(5) | windows((8, 9)),
    )
    for name, node in chosen.children.items():
        ds, same = node.to_dataset(), whole[name].to_dataset()
        assert ds.step.values.tolist() == [4, 5, 7, 8, 9, 10]
        first = ds.W.dims[1:2]
        rows = np.array(CHOSEN.get(name, range(same.W[0].size)))
        at = {"step": ds.step.values, **dict.fromkeys(first, rows)}
        for variable in ("W", "exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(ds[variable], same[variable].isel(at))
        if name in CHOSEN:
            assert ds[first[0]].values.tolist() == rows.tolist()
        assert "grad" not in ds
        table = accounting(ds, replay=False)
        expected = accounting(same.isel(dict.fromkeys(first, rows)), replay=False)
        assert table.identical(expected.sel(step=table.step))
        assert int(table.n_beyond_rounding.sum()) == 0
    assert chosen["wte.weight"].dead.values.tolist() == [True, False]
    result = run("check", tmp_path / "run.zarr")
    assert result.exit_code == 0, result.output


def test_rows_of_any_rank_are_replayed_to_the_bit(tmp_path: Path) -> None:
    chosen = record_small(tmp_path / "run.zarr", tokens=CHOSEN, schedule=every(4))
    for name, node in chosen.children.items():
        table = accounting(node.to_dataset())
        assert table.step.values.tolist() == [4, 8, 12]
        assert int(table.n_different.sum()) == 0, name
    result = run("check", tmp_path / "run.zarr", "--format", "json")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "expected at least one id, or a mask"),
        ([1.5], "1 values of float64; expected at least one id"),
        ([[1, 2]], "expected at least one id, or a mask"),
        ([3, 11], "has rows 0 to 10, and 11 was chosen"),
        ([-1, 3], "has rows 0 to 10, and -1 was chosen"),
        ([True] * 10, r"11 rows, and the mask of its tokens has shape \(10,\)"),
        ([False] * 11, "expected at least one id, or a mask"),
        ({"x": [1]}, "tokens of the one `parameter=` are given as they are"),
    ],
)
def test_tokens_that_there_are_not_are_refused(
    tmp_path: Path, tokens: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        record(tmp_path / "run.zarr", recorder_options={"tokens": tokens})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], "those of several `parameters=` by name"),
        ({"wte": [1]}, "tokens were given for wte, which is not recorded; recorded are up, norm"),
        ({"scale": [0]}, "scale is a single number and has no rows"),
    ],
)
def test_tokens_of_several_are_given_by_name(tmp_path: Path, tokens: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record_small(tmp_path / "run.zarr", tokens=tokens)


def test_labels_are_those_of_all_rows(tmp_path: Path) -> None:
    options = {"tokens": TOKENS, "labels": token_labels(4)}
    with pytest.raises(ConfigError, match="the parameter has 11 tokens, but 4 values"):
        record(tmp_path / "run.zarr", recorder_options=options)


def test_all_tokens_are_no_choice(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"tokens": range(N_TOKENS)})
    assert StoreReader.open(tmp_path / "run.zarr").schema.whole_tokens is None


@pytest.mark.parametrize("ids", [[2, 7, 3, 10], [2, 3, 7, 11], [-1, 3, 7, 10]])
def test_ids_that_cannot_be_are_damage(some: Path, tmp_path: Path, ids: list[int]) -> None:
    path = Path(shutil.copytree(some, tmp_path / "run.zarr"))
    zarr.open_array(path / "token", mode="r+")[...] = np.array(ids)
    with pytest.raises(DamagedStoreError, match="token"):
        open_dataset(path)


def test_runs_of_other_tokens_do_not_open_together(some: Path, tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"tokens": [2, 3, 7, 9]})
    with pytest.raises(ConfigError, match="have the same tokens"):
        open_datasets([some, tmp_path / "run.zarr"])
    assert open_datasets([some]).token.values.tolist() == sorted(TOKENS)


# --- beside the library --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": TOKENS}, "has only some of its tokens"),
        ({"schedule": every(4)}, "has only some of its steps"),
        ({"variables": ("W", "exp_avg")}, "has no grad, exp_avg_sq"),
    ],
)
def test_the_notebooks_file_needs_all(
    tmp_path: Path, options: Mapping[str, object], message: str
) -> None:
    record(tmp_path / "run.zarr", recorder_options=options)
    reader = StoreReader.open(tmp_path / "run.zarr")
    with pytest.raises(ConfigError, match=message):
        export_notebook(reader, tmp_path / "notebook.safetensors")


def test_train_records_what_its_settings_say(tmp_path: Path) -> None:
    chosen = {"variables": "W,exp_avg,exp_avg_sq", "record_tokens": "dead"}
    config = replace(SMALL, steps=13, every=5, windows="1:2", **chosen)
    found = random_data(config)
    train(config, found, tmp_path / "run.zarr")
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds.step.values.tolist() == [0, 1, 2, 4, 5, 9, 10]
    assert ds.token.values.tolist() == np.flatnonzero(found.labels.dead).tolist()
    assert "grad" not in ds
    plan = plan_run(config, tmp_path / "other.zarr").storage
    assert plan.array_bytes == dict.fromkeys(("W", "exp_avg", "exp_avg_sq"), 7 * 307 * 16 * 4)
    assert StoreReader.open(tmp_path / "run.zarr").disk_bytes() <= plan.disk_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, r"every\(0\) cannot work"),
        ({"every": "ten"}, "every is 'ten', but must be a whole number"),
        ({"windows": "1-5"}, "windows is '1-5', but must be spans such as 1:100,900:1000"),
        ({"windows": "5:1"}, r"windows\(\(5, 1\)\) cannot work"),
        ({"record_tokens": "some"}, "must be one of all, live, dead"),
        ({"every": 50, "steps": 40}, r"the schedule every\(50.* includes none of the 40 steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: Mapping[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_settings(settings)


def test_check_and_info_say_what_was_chosen(tmp_path: Path) -> None:
    options = {"schedule": windows((5, 7)) | every(13)}
    record(tmp_path / "run.zarr", n_steps=13, recorder_options=options)
    shown = run("check", tmp_path / "run.zarr", "--tokens", "all").stdout
    assert "Steps    4 to 13: 4 of 6 recorded steps are checked; of the others" in shown
    content = run("check", tmp_path / "run.zarr", "--format", "json").stdout
    assert json.loads(content)["n_steps"] == {"checked": 4, "recorded": 6}
    shown = run("info", tmp_path / "run.zarr").stdout
    assert "6 rows of steps 4 to 13, by schedule windows((5, 7)) | every(13)" in shown
    nothing = run("check", tmp_path / "run.zarr", "--steps", "12")
    assert nothing.exit_code == 2


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        (None, "check"),
        ("grad,exp_avg,exp_avg_sq", "check"),
        ("exp_avg,exp_avg_sq", "check --no-replay"),
        ("grad", "info"),
    ],
)
def test_what_is_named_next_can_be_done(
    tmp_path: Path, variables: str | None, command: str
) -> None:
    config = replace(SMALL, variables=variables)
    train(config, random_data(config), tmp_path / "run.zarr")
    assert _next_command(tmp_path / "run.zarr") == command
    assert run(*command.split(), tmp_path / "run.zarr").exit_code == 0


def test_the_plan_has_the_weights_which_are_always_recorded(tmp_path: Path) -> None:
    plan = plan_run(replace(SMALL, variables="grad"), tmp_path / "run.zarr")
    assert [*plan.storage.array_bytes] == ["W", "grad"]


def test_the_plan_of_less_is_less(tmp_path: Path) -> None:
    lines = run(
        "plan", tmp_path / "run.zarr", "--every", "10", "--windows", "1:2", "--variables", "W,grad"
    ).stdout.splitlines()
    planned = {line.split()[0]: " ".join(line.split()[1:3]) for line in lines if line[:2] == "  "}
    rows = 3 + 2 * 100  # rows 0 to 2, and two for each multiple of ten
    assert planned == dict.fromkeys(("W", "grad"), f"{rows * 10_000 * 64 * 2 / 1e6:.2f} MB")
