"""Batches: every window of a corpus, in a seeded random order, epoch after epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import CorpusError


def sliding_batches(
    ids: np.ndarray, *, seq_len: int, batch_size: int, seed: int, n_skipped: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of inputs and next tokens, for ever.

    Windows are views of the corpus; all that is made for an epoch is its order, 8 bytes a window.
    The order is that of `torch.utils.data.DataLoader` with `shuffle=True` and a generator of this
    seed, as in the original notebook.

    Parameters
    ----------
    ids
        The encoded corpus, shape `(n,)`.
    seq_len
        Tokens a window.
    batch_size
        Windows a batch; the last batch of an epoch may be smaller.
    seed
        Seed of the order.
    n_skipped
        Batches to leave out, as many as were taken before. None of them is read.

    Yields
    ------
    inputs, targets
        int64, shape `(batch, seq_len)`; targets are inputs one token later.

    Raises
    ------
    CorpusError
        If the corpus is shorter than one window and its last target.
    """
    n_windows = len(ids) - seq_len
    if n_windows < 1:
        raise CorpusError(
            f"the corpus has {len(ids)} tokens, and one window takes {seq_len + 1}; "
            "use a longer text or a smaller --seq-len"
        )
    return _epochs(torch.from_numpy(ids).unfold(0, seq_len + 1, 1), batch_size, seed, n_skipped)


def _epochs(
    windows: Tensor, batch_size: int, seed: int, n_skipped: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        torch.empty((), dtype=torch.int64).random_(generator=generator)  # DataLoader's worker seed
        order = torch.randperm(len(windows), generator=generator)
        batches = torch.split(order, batch_size)
        for indices in batches[n_skipped:]:
            chunk = windows[indices].long()
            yield chunk[:, :-1], chunk[:, 1:]
        n_skipped = max(0, n_skipped - len(batches))
        torch.randperm(len(windows), generator=generator)  # drawn by RandomSampler as it ends
