"""Which parameters a recorder takes, and what it calls them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.runs import token_labels
from thimble_zarr import Recorder
from thimble_zarr.errors import ConfigError, OptimizerError
from thimble_zarr.record.parameters import RecordedParameter, choose
from thimble_zarr.store.reader import StoreReader


class Model(nn.Module):
    """Two embeddings, of which the head shares one, and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 5)
        self.wpe = nn.Embedding(7, 5)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.wte.weight


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def optimizer(model: Model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters())


def chosen(
    optimizer: torch.optim.Optimizer,
    parameters: object,
    *,
    model: nn.Module | None = None,
    labels: object = None,
) -> dict[str, RecordedParameter]:
    return choose(optimizer, None, parameters=parameters, model=model, labels=labels)[1]


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("wte.weight", ["wte.weight"]),
        ("*.weight", ["wte.weight", "wpe.weight", "blocks.0.weight", "blocks.1.weight"]),
        (["blocks.1.*", "wpe.*"], ["blocks.1.weight", "blocks.1.bias", "wpe.weight"]),
        (["blocks.[0]*", "blocks.*.bias"], ["blocks.0.weight", "blocks.0.bias", "blocks.1.bias"]),
        ("head.weight", ["wte.weight"]),
    ],
)
def test_patterns_choose_names_of_the_model(
    model: Model, optimizer: torch.optim.Optimizer, parameters: object, names: list[str]
) -> None:
    found = chosen(optimizer, parameters, model=model)
    assert list(found) == names
    known = dict(model.named_parameters())
    assert all(of.tensor is known[name] and of.name == name for name, of in found.items())


def test_a_module_is_all_its_trainable_parameters(
    model: Model, optimizer: torch.optim.Optimizer
) -> None:
    model.blocks[1].bias.requires_grad_(False)
    inside = chosen(optimizer, model.blocks, model=model)
    assert list(inside) == ["blocks.0.weight", "blocks.0.bias", "blocks.1.weight"]
    assert list(chosen(optimizer, model.blocks)) == ["0.weight", "0.bias", "1.weight"]
    assert list(chosen(optimizer, model))[:2] == ["wte.weight", "wpe.weight"]


def test_tensors_are_named_by_a_mapping_the_model_or_the_optimizer(model: Model) -> None:
    optimizer = torch.optim.AdamW(model.named_parameters())
    tensors = [model.blocks[0].bias, model.wte.weight]
    assert list(chosen(optimizer, dict(zip("ab", tensors, strict=True)))) == ["a", "b"]
    assert list(chosen(optimizer, tensors, model=model)) == ["blocks.0.bias", "wte.weight"]
    assert list(chosen(optimizer, tensors)) == ["blocks.0.bias", "wte.weight"]
    assert list(chosen(optimizer, "*.bias")) == ["blocks.0.bias", "blocks.1.bias"]
    assert list(chosen(optimizer, iter([tensors[0], "wpe.*"]), model=model)) == [
        "blocks.0.bias",
        "wpe.weight",
    ]


def test_tied_weights_are_recorded_once(model: Model, optimizer: torch.optim.Optimizer) -> None:
    tied = {"first": model.head.weight, "second": model.wte.weight}
    assert list(chosen(optimizer, tied)) == ["first"]
    both = ["head.weight", "wte.weight", model.head.weight]
    assert list(chosen(optimizer, both, model=model)) == ["wte.weight"]


def test_matrices_of_embeddings_have_tokens(model: Model) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    dims = {name: of.dims for name, of in chosen(optimizer, "*", model=model).items()}
    assert dims == {
        "wte.weight": ("token", "dim"),
        "wpe.weight": ("token", "dim"),
        "blocks.0.weight": ("row", "col"),
        "blocks.0.bias": ("dim",),
        "blocks.1.weight": ("row", "col"),
        "blocks.1.bias": ("dim",),
    }
    both = {"a": model.wte.weight, "b": model.wpe.weight}
    assert {of.dims for of in chosen(optimizer, both).values()} == {("row", "col")}
    labels = token_labels()
    labelled = chosen(optimizer, both, labels={"a": labels})
    assert [of.dims for of in labelled.values()] == [("token", "dim"), ("row", "col")]
    assert labelled["a"].labels is labels


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((), ()),
        ((3,), ("dim",)),
        ((3, 2), ("token", "dim")),
        ((3, 2, 5), ("dim_0", "dim_1", "dim_2")),
    ],
)
def test_a_single_parameter_lies_at_the_root(shape: tuple[int, ...], dims: tuple[str, ...]) -> None:
    tensor = nn.Parameter(torch.zeros(shape))
    _, found = choose(torch.optim.AdamW([tensor]), tensor, name="x")
    assert list(found) == [""]
    assert found[""].tensor is tensor
    assert (found[""].dims, found[""].name) == (dims, "x")


def test_a_model_names_a_single_parameter(model: Model, optimizer: torch.optim.Optimizer) -> None:
    _, found = choose(optimizer, model.head.weight, model=model)
    assert found[""].name == "wte.weight"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            "wpe.wieght",
            r"no parameter is named 'wpe.wieght'; there are wte.weight, wpe.weight, .*head.weight$",
        ),
        ("zzz", r"no parameter is named 'zzz'; there are wte.weight, wpe.weight"),
        ([], "no parameter was chosen"),
        ({}, "no parameter was chosen"),
        (nn.ReLU(), "no parameter was chosen"),
        (nn.Linear(2, 3), r"parameter of shape \(3, 2\) has no name here; pass the `model=`"),
    ],
)
def test_a_choice_of_nothing_is_refused(
    model: Model, optimizer: torch.optim.Optimizer, parameters: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(optimizer, parameters, model=model)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("6.bias", r"'6\.bias'; of 12 names the nearest are \d\.bias, "),
        ("zzz", r"'zzz'; there are 0\.weight, 0\.bias, .*3\.bias and 4 more$"),
    ],
)
def test_of_many_names_the_nearest_are_named_as_such(pattern: str, message: str) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)])
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match=message):
        chosen(optimizer, pattern, model=model)


def test_a_pattern_of_frozen_parameters_is_refused(
    model: Model, optimizer: torch.optim.Optimizer
) -> None:
    model.wpe.requires_grad_(False)
    assert "wpe.weight" not in chosen(optimizer, "*", model=model)
    with pytest.raises(ConfigError, match=r"only parameters that are not trained .*: wpe.weight"):
        chosen(optimizer, "wpe*", model=model)


def test_what_has_no_name_is_refused(model: Model, optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(ConfigError, match=r"shape \(7, 5\) has no name here; pass the `model=`"):
        chosen(optimizer, [model.wpe.weight])
    with pytest.raises(ConfigError, match=r"has a name that 'wpe.\*' could match; pass `model=`"):
        chosen(optimizer, "wpe.*")


def test_what_is_no_tensor_is_refused(model: Model, optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(OptimizerError, match="parameter a is a Embedding; pass its tensor"):
        chosen(optimizer, {"a": model.wpe})
    with pytest.raises(OptimizerError, match="parameter given is a int"):
        chosen(optimizer, [3], model=model)


def test_labels_of_something_else_are_refused(
    model: Model, optimizer: torch.optim.Optimizer
) -> None:
    with pytest.raises(ConfigError, match=r"labels were given for wte.weight, .* wpe"):
        chosen(optimizer, "wpe.*", model=model, labels={"wte.weight": token_labels()})
    with pytest.raises(ConfigError, match="labels of the one `parameter=` are given as they are"):
        chosen(optimizer, "wte.*", model=model, labels=token_labels())
    with pytest.raises(ConfigError, match="those of several `parameters=` by name"):
        choose(optimizer, model.wte.weight, labels={"a": token_labels()})


def test_the_optimizer_must_own_all(model: Model) -> None:
    optimizer = torch.optim.AdamW(model.wte.parameters())
    assert list(chosen(optimizer, "wte.*", model=model)) == ["wte.weight"]
    with pytest.raises(OptimizerError, match=r"does not own the parameter wpe.weight, blocks.0.w"):
        chosen(optimizer, "*", model=model)


def test_attrs_do_not_say_that_a_run_was_imported(
    model: Model, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    for name in ("source_file", "notebook_file"):
        with pytest.raises(ConfigError, match=f"attrs has {name}"):
            Recorder(tmp_path / "run.zarr", optimizer, parameters=model, attrs={name: "a.py"})
    with Recorder(tmp_path / "run.zarr", optimizer, parameters="wte.weight", model=model):
        model.wte.weight.grad = torch.ones_like(model.wte.weight)
        optimizer.step()
    schema = StoreReader.open_each(tmp_path / "run.zarr")[0].schema
    for known in ([], [1], [0, 9, 2], ["a", 1], 3, None):
        odd = replace(schema, attrs={"source_file": {"whole_rows": known}})
        assert odd.whole_rows(13) == range(13)
    assert replace(odd, attrs={"source_file": {"whole_rows": [0, 2]}}).whole_rows(13) == range(2)
