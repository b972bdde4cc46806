"""The Thimble 1 model: a small GPT-2 with tied embeddings, and its optimizer."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from thimble_zarr.errors import ConfigError
from thimble_zarr.experiment.config import TrainingConfig


def find_device(wanted: str | None) -> torch.device:
    """Return the wanted device, or the best there is: cuda, mps, cpu.

    Raises
    ------
    ConfigError
        If the wanted device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted is None:
        return torch.device(next(name for name, there in available.items() if there))
    with suppress(RuntimeError):  # not a device's name
        device = torch.device(wanted)
        n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
        if available.get(device.type, False) and (device.index or 0) < n_devices:
            return device
    there = ", ".join(name for name, there in available.items() if there)
    raise ConfigError(f"device {wanted!r} is not available here; choose from {there}")


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


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters, in the chosen implementation."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=config.optimizer_impl == "foreach",
        fused=config.optimizer_impl == "fused",
    )


def language_loss(
    model: GPT2LMHeadModel, inputs: Tensor, targets: Tensor, *, double_shift: bool
) -> Tensor:
    """Return the mean cross-entropy of the next token, in nats.

    With `double_shift` the targets, which are shifted already, are shifted once more, as
    `GPT2LMHeadModel` does with the `labels` it is given: the model then learns the token after
    next, as in the original notebook.
    """
    logits = model(input_ids=inputs, use_cache=False).logits
    if double_shift:
        logits, targets = logits[:, :-1], targets[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
