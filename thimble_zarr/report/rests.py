"""How long tokens rest, and whether they moved again: what a rest at the end is worth."""

from dataclasses import dataclass

import numpy as np

from thimble_zarr.report.downsample import blocks
from thimble_zarr.report.panels.regimes import Exits
from thimble_zarr.report.run import Run


@dataclass(frozen=True, kw_only=True)
class Rests:
    """Steps without any change of each token, of those whose change is known; shape `(token,)`.

    Attributes
    ----------
    at_end
        How many steps it has not moved for when the recording ends.
    ended
        The most consecutive steps after its first move that it rested for, and then moved again.
    """

    at_end: np.ndarray
    ended: np.ndarray

    @classmethod
    def of(cls, run: Run, exits: Exits) -> "Rests":
        """Count them in the summary, block by block."""
        sizes, follows = run.summary["l2_ulp"], run.follows
        n_tokens = sizes.sizes["token"]
        length, ended = np.zeros(n_tokens, np.int64), np.zeros(n_tokens, np.int64)
        has_moved = np.zeros(n_tokens, bool)
        for block in blocks(len(follows), sizes.dtype.itemsize * n_tokens):
            values = sizes[block].transpose("step", "token").values
            for of_step, is_known in zip(values, follows[block], strict=True):
                moves = of_step > 0
                ends = moves & has_moved
                ended[ends] = np.maximum(ended, length)[ends]
                # A rest is of steps of which it is known that the token did not move.
                length = np.where((of_step == 0) & is_known, length + 1, 0)
                has_moved |= moves
        return cls(at_end=exits.last - exits.late, ended=ended)
