"""What is known of tokens, outside a store: the token mask.

The mask is a safetensors file that says which tokens are live and which are dead. The second
notebook reads its `dead_mask`. Our own masks have `live_mask` beside it.
"""

from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from thimble_zarr.errors import CorpusError
from thimble_zarr.format.schema import TokenLabels


def write_mask(file: Path, labels: TokenLabels) -> None:
    """Write `live_mask` and `dead_mask` as the notebook kept them, bool, shape `(token,)`.

    The labels must know live tokens. Raises OSError if the file cannot be written.
    """
    assert labels.live is not None
    masks = {"live_mask": labels.live, "dead_mask": ~labels.live}
    file.write_bytes(safetensors.numpy.save(masks))


def read_mask(file: Path, n_tokens: int) -> np.ndarray:
    """Read which of the tokens of a vocabulary are live: bool, shape `(token,)`.

    It is what `live_mask` says, or `dead_mask` where there is no other.

    Raises
    ------
    CorpusError
        If the mask cannot be read or is of another vocabulary.
    """
    try:
        with safetensors.safe_open(file, "np") as tensors:
            names = list(tensors.keys())
            known = {"live_mask", "dead_mask"} & {*names}
            masks = {name: tensors.get_tensor(name).astype(bool) for name in known}
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise CorpusError(f"cannot read the token mask {file}: {error}") from error
    if not masks:
        raise CorpusError(
            f"the token mask {file} has neither live_mask nor dead_mask, only {', '.join(names)}"
        )
    live: np.ndarray = masks["live_mask"] if "live_mask" in masks else ~masks["dead_mask"]
    if "dead_mask" in masks and not np.array_equal(live, ~masks["dead_mask"]):
        raise CorpusError(f"the token mask {file}: some tokens are both live and dead, or neither")
    if live.shape != (n_tokens,):
        raise CorpusError(
            f"the token mask {file} has shape {live.shape}, but the vocabulary has {n_tokens:,} "
            "tokens; use the mask of this tokenizer"
        )
    return live
