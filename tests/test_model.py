from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.notebook import notebook_model
from thimble_zarr.errors import ConfigError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.model import (
    build_model,
    build_optimizer,
    embedding,
    find_device,
    language_loss,
)

CPU = torch.device("cpu")

TINY = TrainingConfig(
    vocab_size=31, hidden_dim=6, heads=3, layers=1, seq_len=7, batch_size=5, dtype="float32"
)


def tokens_and_targets(config: TrainingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    windows = torch.randint(
        config.vocab_size, (config.batch_size, config.seq_len + 1), generator=generator
    )
    return windows[:, :-1], windows[:, 1:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_bit_for_bit_the_notebooks_at_the_same_seed(dtype: str) -> None:
    config = replace(TINY, dtype=dtype)
    torch.manual_seed(config.seed)
    ours = build_model(config, CPU).state_dict()
    torch.manual_seed(config.seed)
    theirs = notebook_model(config).state_dict()
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == getattr(torch, dtype)
        assert torch.equal(ours[name], values), name


def test_the_default_model_has_as_many_parameters_as_gpt2_of_that_shape() -> None:
    config = TrainingConfig()
    model = build_model(config, CPU)
    vocab, positions, d, layers = 10_000, 128, 64, 2
    a_layer = 12 * d**2 + 13 * d  # attention and feed-forward weights, their biases, two norms
    expected = (vocab + positions) * d + layers * a_layer + 2 * d  # the output is the input, tied
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 748_288
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_embedding_is_input_and_output_and_owned_by_the_model() -> None:
    model = build_model(TINY, CPU)
    weight = embedding(model)
    assert weight.shape == (31, 6)
    assert model.lm_head.weight is weight
    assert any(parameter is weight for parameter in model.parameters())


def test_the_initial_embedding_has_the_chosen_scale() -> None:
    torch.manual_seed(0)
    values = embedding(build_model(replace(TINY, vocab_size=5000, init_scale=0.5), CPU)).detach()
    assert float(values.std()) == pytest.approx(0.5, rel=0.02)
    assert float(values.mean()) == pytest.approx(0, abs=0.02)


def test_nothing_in_the_model_is_random_while_it_trains() -> None:
    model = build_model(TINY, CPU)
    assert model.training
    inputs, targets = tokens_and_targets(TINY)
    first, second = (language_loss(model, inputs, targets, double_shift=False) for _ in range(2))
    assert float(first.detach()) == float(second.detach())


def test_double_shift_is_the_loss_of_gpt2_given_the_targets_as_labels() -> None:
    model = build_model(TINY, CPU)
    inputs, targets = tokens_and_targets(TINY)
    ours = language_loss(model, inputs, targets, double_shift=True)
    theirs = model(input_ids=inputs, labels=targets).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, embedding(model))[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_without_double_shift_it_is_the_cross_entropy_of_the_next_token() -> None:
    model = build_model(TINY, CPU)
    with torch.no_grad():
        embedding(model).mul_(30)  # so that the loss depends on the targets by more than rounding
        inputs, targets = tokens_and_targets(TINY)
        logits = model(input_ids=inputs).logits.double()
    probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    of_targets = [
        float(probabilities[row, position, targets[row, position]])
        for row in range(TINY.batch_size)
        for position in range(TINY.seq_len)
    ]
    expected = -torch.tensor(of_targets, dtype=torch.float64).log().mean()
    loss = language_loss(model, inputs, targets, double_shift=False)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    double = language_loss(model, inputs, targets, double_shift=True)
    assert float(double.detach()) != pytest.approx(float(expected), rel=1e-3)


def test_the_loss_of_a_bfloat16_model_is_reduced_in_float32() -> None:
    config = replace(TINY, dtype="bfloat16")
    model = build_model(config, CPU)
    inputs, targets = tokens_and_targets(config)
    loss = language_loss(model, inputs, targets, double_shift=False)
    assert loss.dtype == torch.float32
    logits = model(input_ids=inputs).logits.detach().double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("implementation", ["single", "foreach", "fused"])
def test_the_optimizer_has_the_settings_and_all_parameters(implementation: str) -> None:
    config = replace(
        TINY,
        lr=0.125,
        weight_decay=0.25,
        beta1=0.5,
        beta2=0.75,
        eps=0.0625,
        optimizer_impl=implementation,
    )
    model = build_model(config, CPU)
    (group,) = build_optimizer(model, config).param_groups
    assert {id(owned) for owned in group["params"]} == {id(owned) for owned in model.parameters()}
    found = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
    assert found == {"lr": 0.125, "weight_decay": 0.25, "betas": (0.5, 0.75), "eps": 0.0625}
    assert bool(group["foreach"]) == (implementation == "foreach")
    assert bool(group["fused"]) == (implementation == "fused")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_is_found(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device(None).type == expected
    assert find_device(expected).type == expected
    assert find_device("cpu").type == "cpu"


def test_a_numbered_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "mps", "tpu", "", "cpu:x", "cpu:", "cpu:-2"])
def test_a_device_that_is_not_there_is_refused_and_those_there_are_named(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"'{wanted}'.*cpu"):
        find_device(wanted)
