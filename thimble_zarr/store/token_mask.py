"""What is known of tokens, outside a store: the token mask.

The mask is a safetensors file that says which tokens are live and which are dead. The second
notebook reads its `dead_mask`. Our own masks have `live_mask` beside it. Others call them
`trained_mask` and `untrained_mask`, have ids, or count how often each token occurs.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from thimble_zarr.errors import CorpusError
from thimble_zarr.format.schema import TokenLabels

_LIVE, _DEAD = ("live", "trained"), ("dead", "untrained")

_COUNTS = "token_occurrence_counts"

LABEL_NAMES = frozenset(
    f"{word}_{kind}" for word in (*_LIVE, *_DEAD) for kind in ("mask", "ids", "indices")
) | {_COUNTS}
"""What arrays are called that label tokens: masks, ids, or counts."""


def write_mask(file: Path, labels: TokenLabels) -> None:
    """Write `live_mask` and `dead_mask` as the notebook kept them, bool, shape `(token,)`.

    The labels must know live tokens. Raises OSError if the file cannot be written.
    """
    assert labels.live is not None
    masks = {"live_mask": labels.live, "dead_mask": ~labels.live}
    file.write_bytes(safetensors.numpy.save(masks))


def read_mask(file: Path, n_tokens: int) -> TokenLabels:
    """Read what is known of the tokens of a vocabulary.

    Raises
    ------
    CorpusError
        If the mask cannot be read or is of another vocabulary.
    """
    try:
        with safetensors.safe_open(file, "np") as tensors:
            names = list(tensors.keys())
            known = {name: tensors.get_tensor(name) for name in names if name in LABEL_NAMES}
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise CorpusError(f"cannot read the token mask {file}: {error}") from error
    try:
        labels = labels_from(known, n_tokens)
    except CorpusError as error:
        raise CorpusError(f"the token mask {file}: {error}") from error
    if labels.live is None:
        raise CorpusError(
            f"the token mask {file} has neither live_mask nor dead_mask, only {', '.join(names)}"
        )
    return labels


def labels_from(arrays: Mapping[str, np.ndarray], n_tokens: int) -> TokenLabels:
    """Return labels of a vocabulary of so many tokens, from arrays named as in `LABEL_NAMES`.

    Raises
    ------
    CorpusError
        If they contradict each other, or are of another vocabulary.
    """
    lives = [_mask(name, arrays[name], n_tokens) for name in sorted(arrays) if name != _COUNTS]
    count = arrays.get(_COUNTS)
    if count is not None:
        _check_length(_COUNTS, count, n_tokens)
        if count.dtype.kind not in "iu" or (count < 0).any():
            raise CorpusError(f"{_COUNTS} are not counts: whole numbers from 0 up")
    if not lives:
        return TokenLabels() if count is None else TokenLabels.from_counts(count)
    if any(not np.array_equal(live, lives[0]) for live in lives):
        raise CorpusError("some tokens are both live and dead, or neither")
    return TokenLabels(count=count, live=lives[0], dead=~lives[0])


def _mask(name: str, values: np.ndarray, n_tokens: int) -> np.ndarray:
    """Return which tokens are live, from a mask or ids of live or dead ones."""
    word, _, kind = name.partition("_")
    if kind == "mask":
        _check_length(name, values, n_tokens)
        mask = values.astype(bool)
    elif (
        values.ndim != 1
        or values.dtype.kind not in "iu"
        or ((values < 0) | (values >= n_tokens)).any()
    ):
        raise CorpusError(f"{name} are not ids of a vocabulary of {n_tokens:,} tokens")
    else:
        mask = np.zeros(n_tokens, bool)
        mask[values] = True
    return mask if word in _LIVE else ~mask


def _check_length(name: str, values: np.ndarray, n_tokens: int) -> None:
    if values.shape != (n_tokens,):
        raise CorpusError(
            f"{name} has shape {values.shape}, but the vocabulary has {n_tokens:,} tokens; use the "
            "mask of this tokenizer"
        )
