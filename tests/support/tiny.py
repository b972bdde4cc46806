"""Thimble 1, as small as it can be."""

import numpy as np

from thimble_zarr import TokenLabels
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import (
    TrainingData,
)

SMALL = TrainingConfig(
    steps=40, batch_size=2, seq_len=8, vocab_size=307, hidden_dim=16, layers=1, dtype="float32"
)


def random_data(config: TrainingConfig) -> TrainingData:
    ids = np.random.default_rng(0).integers(config.vocab_size, size=500)
    count = np.bincount(ids, minlength=config.vocab_size)
    texts = [f" token {token}" for token in range(config.vocab_size)]
    return TrainingData("random", ids, TokenLabels.from_counts(count, texts), {})


TINY = TrainingConfig(
    steps=7,
    batch_size=3,
    seq_len=5,
    vocab_size=29,
    hidden_dim=6,
    layers=1,
    heads=2,
    lr=1e-2,
    weight_decay=0.1,
    dtype="float32",
    compute_dtype="float32",
    loss_chunk=4,
    device="cpu",
)
"""Four batches an epoch of `DATA`, the last one smaller, so that seven steps see two epochs."""


IDS = np.random.default_rng(1).integers(23, size=16)


DATA = TrainingData(
    "random",
    IDS,
    TokenLabels.from_counts(np.bincount(IDS, minlength=29), [f" t{token}" for token in range(29)]),
    {"corpus": {"name": "random"}},
)
