import importlib

import pytest
import torch

from tests.support.runs import Loop
from thimble_zarr.errors import OptimizerError
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.record.capture import LiveOptimizer, optimizer_spec

adam_module = importlib.import_module("torch.optim.adam")


def info(loop: Loop) -> Optimizer:
    return live(loop).specs()[""]


def live(loop: Loop, **parameters: torch.Tensor) -> LiveOptimizer:
    return LiveOptimizer(loop.optimizer, parameters or {"": loop.weight})


def scalars(loop: Loop, name: str = "", **parameters: torch.Tensor) -> dict[str, float]:
    looked = live(loop, **parameters)
    return looked._scalars(name, looked._by_parameter(dict)[name])


@pytest.mark.parametrize(
    ("options", "implementation"),
    [
        ({}, "single"),  # torch's own choice on the CPU
        ({"foreach": False}, "single"),
        ({"foreach": True}, "foreach"),
        ({"fused": True}, "fused"),
    ],
)
def test_the_implementation_is_the_one_torch_runs(
    options: dict[str, bool], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(**options)
    assert info(loop).implementation == implementation
    programs = {
        "_single_tensor_adam": "single",
        "_multi_tensor_adam": "foreach",
        "_fused_adam": "fused",
    }
    ran = []
    for function, name in programs.items():
        monkeypatch.setattr(adam_module, function, lambda *a, name=name, **k: ran.append(name))
    loop.backward()
    loop.optimizer.step()
    assert ran == [implementation]


def test_decay_is_decoupled_in_adamw_only() -> None:
    for cls, decoupled in ((torch.optim.AdamW, True), (torch.optim.Adam, False)):
        loop = Loop(optimizer=cls)
        assert info(loop).decoupled_weight_decay is decoupled


@pytest.mark.parametrize("cls", [torch.optim.SparseAdam])
def test_other_optimizers_are_refused(cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(OptimizerError, match=f"{cls.__name__} cannot be recorded"):
        optimizer_spec(Loop(optimizer=cls).optimizer)


def test_a_parameter_of_another_model_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"does not own .* \(11, 5\)"):
        LiveOptimizer(Loop().optimizer, {"": Loop().weight}).specs()


def test_a_parameter_is_found_in_a_later_group() -> None:
    loop = Loop()
    other = torch.nn.Parameter(torch.zeros(3, 2))
    loop.optimizer.add_param_group({"params": [other], "lr": 0.5})
    assert scalars(loop, "other", other=other)["learning_rate"] == 0.5


def test_hyperparameters_may_be_tensors() -> None:
    loop = Loop(lr=torch.tensor(0.25))
    assert scalars(loop) == {
        "learning_rate": 0.25,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-2,
    }


def test_states_are_those_of_the_optimizer() -> None:
    loop = Loop(amsgrad=True)
    tensors = live(loop).states("", info(loop))
    assert set(tensors) == {"W", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert not tensors["exp_avg"].any()  # as they begin
    assert live(loop).counter.count("") == 0
    loop.step()
    tensors = live(loop).states("", info(loop))
    assert tensors["exp_avg"] is loop.optimizer.state[loop.weight]["exp_avg"]
    assert live(loop).counter.count("") == 1
