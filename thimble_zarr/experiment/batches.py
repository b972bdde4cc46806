"""Batches: every window of a corpus, in a seeded random order, epoch after epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import CorpusError


def sliding_batches(
    ids: np.ndarray, *, seq_len: int, batch_size: int, seed: int, n_skipped: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of inputs and next tokens, for ever: int64, shape `(batch, seq_len)`.

    Windows are views of the corpus; all that is made for an epoch is its order, 4 bytes a window.
    The order is that of `torch.utils.data.DataLoader` with `shuffle=True` and a generator of this
    seed, as in the original notebook. The last batch of an epoch may be smaller. The first
    `n_skipped` batches are left out, and none of them is read. Raises CorpusError if the corpus is
    shorter than one window and its last target.
    """
    n_windows = len(ids) - seq_len
    if n_windows < 1:
        raise CorpusError(
            f"the corpus has {len(ids)} tokens, and one sequence takes {seq_len + 1}; "
            "use a longer text or a smaller --seq-len"
        )
    return _epochs(torch.from_numpy(ids).unfold(0, seq_len + 1, 1), batch_size, seed, n_skipped)


def _epochs(
    windows: Tensor, batch_size: int, seed: int, n_skipped: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    n_batches = -(-len(windows) // batch_size)
    while True:
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # DataLoader's worker seed
        order = _shuffled(len(windows), generator)
        for batch in range(n_skipped, n_batches):
            indices = order[batch * batch_size : (batch + 1) * batch_size]
            chunk = windows[indices.long()].long()
            yield chunk[:, :-1], chunk[:, 1:]
        del order  # before the next one is drawn
        n_skipped = max(0, n_skipped - n_batches)
        _shuffled(len(windows), generator)  # drawn by RandomSampler as it ends


def _shuffled(n: int, generator: torch.Generator) -> Tensor:
    """Return a random order of `range(n)`: the one of `torch.randperm`, in half of its bytes."""
    dtype = torch.int32 if n < 2**31 else torch.int64
    return torch.randperm(n, generator=generator, dtype=dtype)
