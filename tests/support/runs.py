"""Small training runs whose truth is kept by hand, as the original notebook keeps it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from thimble_zarr import Recorder, TokenLabels

N_TOKENS, N_DIMS, N_STEPS = 11, 5, 13
"""Primes, all different, so that a mixed-up axis cannot hide."""

N_LIVE = 7

TINY_MEMORY = 8000
"""Memory bound that makes the toy run take blocks of four steps in bfloat16, two in float32."""


@dataclass
class History:
    """What a loop saw: clones taken by hand, one a row, and the scalars of each step."""

    tensors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)

    def append(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.tensors.setdefault(name, []).append(tensor.detach().clone())

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a variable as float64, shape (step, token, dim)."""
        return torch.stack(self.tensors[name]).double().numpy()


def live_mask(n_tokens: int = N_TOKENS, n_live: int = N_LIVE) -> np.ndarray:
    """Return which tokens occur: they are among the others, and a store keeps them apart."""
    live = np.zeros(n_tokens, bool)
    live[np.random.default_rng(1).permutation(n_tokens)[:n_live]] = True
    return live


def token_labels(n_tokens: int = N_TOKENS, n_live: int = N_LIVE) -> TokenLabels:
    count = np.where(live_mask(n_tokens, n_live), 3, 0)
    return TokenLabels.from_counts(count, [f" t{token}" for token in range(n_tokens)])


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Give torch `n` threads; a test session gives it one."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Loop:
    """A model of an embedding and a linear layer, trained on random live tokens."""

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.bfloat16,
        n_tokens: int = N_TOKENS,
        n_dims: int = N_DIMS,
        n_live: int = N_LIVE,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **optimizer_options: object,
    ) -> None:
        torch.manual_seed(0)
        self.n_live = n_live
        self.live = torch.from_numpy(np.flatnonzero(live_mask(n_tokens, n_live)))
        self.embedding = nn.Embedding(n_tokens, n_dims).to(dtype)
        self.head = nn.Linear(n_dims, n_tokens).to(dtype)
        nn.init.normal_(self.embedding.weight, std=0.02)
        parameters = [*self.embedding.parameters(), *self.head.parameters()]
        self.optimizer = optimizer(parameters, **{"lr": 1e-2, **optimizer_options})

    @property
    def weight(self) -> nn.Parameter:
        return self.embedding.weight

    def backward(self) -> torch.Tensor:
        drawn = torch.randint(0, self.n_live, (8,))
        logits = self.head(self.embedding(self.live[drawn])).float()
        loss = nn.functional.cross_entropy(logits, self.live[(drawn + 1) % self.n_live])
        # A small pull on every row, so that dead tokens have gradients, as with tied weights.
        loss = loss + 1e-3 * self.embedding.weight.float().pow(2).sum()
        loss.backward()
        return loss

    def step(self) -> float:
        loss = self.backward()
        self.optimizer.step()
        return float(loss.detach())


def record(
    path: Path,
    *,
    n_steps: int = N_STEPS,
    recorder_options: Mapping[str, object] | None = None,
    **loop_options: object,
) -> History:
    """Record a toy run at `path` and return what really happened."""
    loop, history = Loop(**loop_options), History()
    options = {
        "labels": token_labels(len(loop.weight), loop.n_live),
        "memory_bytes": TINY_MEMORY,
        **(recorder_options or {}),
    }
    history.append(W=loop.weight, grad=torch.full_like(loop.weight, torch.nan))
    history.append(exp_avg=torch.zeros_like(loop.weight), exp_avg_sq=torch.zeros_like(loop.weight))
    with Recorder(path, loop.optimizer, parameter=loop.weight, **options) as recorder:
        for _ in range(n_steps):
            history.losses.append(loop.step())
            recorder.log(loss=history.losses[-1])
            state = loop.optimizer.state[loop.weight]
            history.append(W=loop.weight, grad=loop.weight.grad)
            history.append(exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"])
            history.learning_rates.append(float(loop.optimizer.param_groups[0]["lr"]))
            loop.optimizer.zero_grad()
    return history
