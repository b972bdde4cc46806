"""The Thimble 1 model: a small GPT-2 with tied embeddings, and its optimizer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel

from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.optimizers import OPTIMIZERS


def build_model(config: TrainingConfig, device: torch.device) -> GPT2LMHeadModel:
    """Return the untrained model, on its device and wholly in the chosen dtype."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.seq_len,
            n_embd=config.hidden_dim,
            n_layer=config.layers,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    nn.init.normal_(embedding(model), mean=0.0, std=config.init_scale)
    model.to(getattr(torch, config.dtype)).to(device)
    return model.train()


def embedding(model: GPT2LMHeadModel) -> nn.Parameter:
    """Return the tied embedding, shape `(token, dim)`."""
    weight = model.transformer.wte.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters that it takes, in the chosen implementation."""
    kind = getattr(torch.optim, OPTIMIZERS[config.optimizer].kind)
    parameters = (weight for weight in model.parameters() if _takes(config, weight))
    optimizer: torch.optim.Optimizer = kind(parameters, **config.optimizer_options)
    return optimizer


def build_optimizer_of_others(
    model: nn.Module, config: TrainingConfig
) -> torch.optim.Optimizer | None:
    """Return the optimizer of the parameters that the chosen one does not take; None if it does."""
    others = [weight for weight in model.parameters() if not _takes(config, weight)]
    if not others:
        return None
    own: dict[str, Any] = config.optimizer_settings
    return torch.optim.AdamW(others, own["lr"], weight_decay=own["weight_decay"])


def _takes(config: TrainingConfig, weight: Tensor) -> bool:
    return weight.ndim == 2 or not OPTIMIZERS[config.optimizer].takes_matrices_only


def language_loss(
    model: GPT2LMHeadModel, inputs: Tensor, targets: Tensor, config: TrainingConfig
) -> Tensor:
    """Return the mean cross-entropy of the next token, in nats, float32.

    `inputs` and `targets` are int64, shape `(batch, position)`. Forward and backward run on copies
    of the parameters in `compute_dtype`, made once a step, so that the gradients arrive at the
    parameters in the parameters' own dtype. `double_shift` shifts the targets, which are shifted
    already, once more, as `GPT2LMHeadModel` does with the `labels` it is given: the model then
    learns the token after next, as in the original notebook. Of `loss_chunk` positions the logits
    are held at once, in float32; 0 holds all, in `compute_dtype`.
    """
    compute_dtype = getattr(torch, config.compute_dtype)
    transformer = model.transformer
    weights = {name: weight.to(compute_dtype) for name, weight in transformer.named_parameters()}
    call = {"input_ids": inputs, "use_cache": False}
    hidden = functional_call(transformer, weights, kwargs=call).last_hidden_state
    if config.double_shift:
        hidden, targets = hidden[:, :-1], targets[:, 1:]
    hidden, head, targets = hidden.flatten(0, 1), weights["wte.weight"], targets.flatten()
    if config.loss_chunk:
        return chunked_cross_entropy(hidden.float(), head.float(), targets, config.loss_chunk)
    return F.cross_entropy(F.linear(hidden, head).float(), targets)


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Return the mean cross-entropy of `hidden @ head.T`; `chunk` rows of that are held at once."""
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        return F.linear_cross_entropy(hidden, head, targets, options=options)
    apply: Callable[..., Tensor] = _ChunkedCrossEntropy.apply
    return apply(hidden, head, targets, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The same for any torch: each chunk's gradients are taken before its logits are dropped."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros(())
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (hidden[rows], head)]
                loss = F.cross_entropy(F.linear(*leaves), targets[rows], reduction="sum")
            hidden_grad[rows], of_head = torch.autograd.grad(loss, leaves)
            head_grad += of_head
            total += loss.detach()
        ctx.save_for_backward(hidden_grad / len(targets), head_grad / len(targets))
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        return hidden_grad * grad, head_grad * grad, None, None
