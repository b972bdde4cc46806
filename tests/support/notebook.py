"""The model of the first notebook, apart from the oracles because it takes long to import."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from thimble_zarr.experiment.config import TrainingConfig


def notebook_model(config: TrainingConfig) -> GPT2LMHeadModel:
    """The model as the original notebook makes it."""
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
            tie_word_embeddings=True,
            bos_token_id=None,  # newer transformers warn of an id outside a small vocabulary
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        nn.init.normal_(model.transformer.wte.weight, mean=0.0, std=config.init_scale)
    return model.to(getattr(torch, config.dtype))
