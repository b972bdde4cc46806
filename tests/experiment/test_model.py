import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.notebook import notebook_model
from tests.support.peak import linux_only, measured
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.model import (
    _ChunkedCrossEntropy,
    build_model,
    build_optimizer,
    chunked_cross_entropy,
    embedding,
    language_loss,
)

CPU = torch.device("cpu")

TINY = TrainingConfig(
    vocab_size=31, hidden_dim=6, heads=3, layers=1, seq_len=7, batch_size=5, dtype="float32"
)


def loss_of(
    model: nn.Module,
    tokens: tuple[torch.Tensor, torch.Tensor],
    *,
    double_shift: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    loss_chunk: int = 0,
) -> torch.Tensor:
    """The loss as the notebook computes it, but for what a test chooses."""
    config = TrainingConfig(
        double_shift=double_shift,
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        loss_chunk=loss_chunk,
    )
    return language_loss(model, *tokens, config)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


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
    first, second = (loss_of(model, tokens_and_targets(TINY)) for _ in range(2))
    assert float(first.detach()) == float(second.detach())


def test_double_shift_is_the_loss_of_gpt2_given_the_targets_as_labels() -> None:
    model = build_model(TINY, CPU)
    inputs, targets = tokens_and_targets(TINY)
    theirs = model(input_ids=inputs, labels=targets).loss
    for loss_chunk in (0, 4):
        ours = loss_of(model, (inputs, targets), double_shift=True, loss_chunk=loss_chunk)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        one, other = (
            torch.autograd.grad(loss, embedding(model), retain_graph=True)[0]
            for loss in (ours, theirs)
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


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
    for loss_chunk in (0, 4):
        loss = loss_of(model, (inputs, targets), loss_chunk=loss_chunk)
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    double = loss_of(model, (inputs, targets), double_shift=True)
    assert float(double.detach()) != pytest.approx(float(expected), rel=1e-3)


BFLOAT16 = replace(TINY, dtype="bfloat16")


def test_the_loss_of_a_bfloat16_model_is_reduced_in_float32() -> None:
    model = build_model(BFLOAT16, CPU)
    inputs, targets = tokens_and_targets(BFLOAT16)
    logits = model(input_ids=inputs).logits.detach().double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for loss_chunk, tolerance in ((0, 1e-6), (4, 1e-4)):
        loss = loss_of(
            model, (inputs, targets), compute_dtype=torch.bfloat16, loss_chunk=loss_chunk
        )
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(expected), rel=tolerance)


def test_in_bfloat16_with_whole_logits_it_is_the_notebooks_way_bit_for_bit() -> None:
    model = build_model(BFLOAT16, CPU)
    inputs, targets = tokens_and_targets(BFLOAT16)
    ours = loss_of(model, (inputs, targets), compute_dtype=torch.bfloat16)
    logits = model(input_ids=inputs).logits.float()
    theirs = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.equal(ours, theirs)
    found, expected = (gradients(model, loss) for loss in (ours, theirs))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_float32_the_gradients_of_a_bfloat16_model_are_rounded_once() -> None:
    """The oracle is a float32 model with the same weights, as transformers computes it."""
    model = build_model(BFLOAT16, CPU)
    inputs, targets = tokens_and_targets(BFLOAT16)
    found = gradients(model, loss_of(model, (inputs, targets)))
    wide = copy.deepcopy(model).float()
    logits = wide(input_ids=inputs).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected = gradients(wide, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.bfloat16, name
        assert torch.equal(gradient, expected[name].bfloat16()), name
    narrow = gradients(model, loss_of(model, (inputs, targets), compute_dtype=torch.bfloat16))
    assert any(not torch.equal(narrow[name], found[name]) for name in found)


class Casts(TorchDispatchMode):
    """Watches which tensors torch casts."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_each_parameter_is_cast_once_tied_ones_too() -> None:
    model = build_model(BFLOAT16, CPU)
    for loss_chunk in (0, 4):
        with Casts() as casts:
            loss_of(model, tokens_and_targets(BFLOAT16), loss_chunk=loss_chunk)
        shapes = sorted(parameter.shape for parameter in model.parameters())
        assert sorted(casts.shapes) == shapes


LOGITS = """
import torch
from thimble_zarr.experiment.model import _ChunkedCrossEntropy, chunked_cross_entropy
hidden = torch.randn(8192, 4, requires_grad=True)
head, targets = torch.randn(10_000, 4, requires_grad=True), torch.randint(10_000, (8192,))
chunked_cross_entropy(hidden[:8], head, targets[:8], 1).backward()
peaks = [peak()]
for loss, chunk in (
    (chunked_cross_entropy, 256), (_ChunkedCrossEntropy.apply, 256), (chunked_cross_entropy, 8192)
):
    loss(hidden, head, targets, chunk).backward()
    peaks.append(peak())
print(peaks)
"""


@linux_only
def test_with_a_chunk_the_logits_are_never_whole() -> None:
    before, chunked, older, whole = measured(LOGITS)
    logits = 8192 * 10_000 * 4
    assert chunked - before < logits / 2
    assert older - before < logits / 2
    assert whole - before > logits  # so that the bounds above can be missed


@pytest.mark.parametrize("loss", [chunked_cross_entropy, _ChunkedCrossEntropy.apply])
@pytest.mark.parametrize("chunk", [1, 7, 60, 100])
def test_a_chunked_loss_is_the_plain_one_but_for_rounding(
    loss: Callable[..., torch.Tensor], chunk: int
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(60, 3, requires_grad=True)
    head, targets = torch.randn(29, 3, requires_grad=True), torch.randint(29, (60,))
    ours = loss(hidden, head, targets, chunk)
    theirs = nn.functional.cross_entropy((hidden @ head.T).double(), targets)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for found, expected in zip(
        *(torch.autograd.grad(one, [hidden, head]) for one in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_an_older_torch_takes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(6, 3), torch.randn(5, 3)
    targets = torch.randint(5, (6,))
    ours = chunked_cross_entropy(hidden, head, targets, 4)
    monkeypatch.delattr(nn.functional, "linear_cross_entropy", raising=False)
    theirs = chunked_cross_entropy(hidden, head, targets, 4)
    assert float(theirs) == pytest.approx(float(ours), rel=1e-6)


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
