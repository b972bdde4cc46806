"""The rules by which arrays of a file become a run: their names, their rows, their tokens.

A series of as many rows as `W` belongs to steps 0 to N, one of a row less to steps 1 to N. A row
that is not there is missing, never zero.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from thimble_zarr.bits import decode
from thimble_zarr.errors import CorpusError, NotAStoreError
from thimble_zarr.format.labels import TokenLabels
from thimble_zarr.format.schema import Json
from thimble_zarr.sources.containers.array import FileArray, FileContents, whole
from thimble_zarr.sources.recorded import RecordedRun, Series
from thimble_zarr.store.token_mask import LABEL_NAMES, labels_from

WEIGHTS = ("W", "embeddings", "embedding_history")

VARIABLES: Mapping[str, tuple[str, ...]] = {
    "W": WEIGHTS,
    "grad": ("grad_W", "grads", "g"),
    "exp_avg": ("momentum_W", "momentum", "m"),
    "exp_avg_sq": ("variance_W", "variance", "v"),
}
"""What files call our variables."""

LOSSES = ("losses", "loss")

TOKEN_IDS = ("dead_indices", "dead_ids", "untrained_indices")
"""What files call the ids of the tokens they have, where those are the dead ones only."""

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_dim": ("hidden_dim", "d_model"),
    "layers": ("n_layers", "num_layers"),
    "heads": ("n_heads", "num_heads"),
    "steps": ("num_steps", "n_steps"),
    "batch_size": ("batch_size",),
    "lr": ("learning_rate", "lr"),
    "weight_decay": ("weight_decay", "wd"),
    "beta1": ("adam_beta1", "beta1"),
    "beta2": ("adam_beta2", "beta2"),
    "eps": ("adam_epsilon", "adam_eps", "epsilon", "eps"),
    "init_scale": ("init_scale", "init_std"),
    "seed": ("seed", "random_seed"),
}
"""Settings of a run, and what files call them."""

HYPERPARAMETERS: Mapping[str, str] = {
    "learning_rate": "lr",
    "beta1": "beta1",
    "beta2": "beta2",
    "eps": "eps",
    "weight_decay": "weight_decay",
}
"""Our per-step scalars, and the settings they are, of which a file has one value."""


def has_weights(contents: FileContents) -> bool:
    """Return whether one of the arrays is called as weights are."""
    return any(name in contents.arrays for name in WEIGHTS)


def run_of(
    contents: FileContents,
    arrays: Mapping[str, FileArray] | None = None,
    *,
    parameter: str | None = None,
) -> RecordedRun:
    """Return the run in a file by the rules, or that in some of its arrays.

    Raises NotAStoreError if the arrays do not fit together, and CorpusError if labels do not.
    """
    if arrays is not None:
        contents = FileContents(contents.path, contents.container, arrays, contents.settings)
    series = _series(contents)
    n_rows, n_tokens = series["W"].array.shape[:2]
    loss_name, losses = contents.named(LOSSES)
    known = {name for name in contents.arrays if name in LABEL_NAMES}
    token_ids, labels, whole_tokens = _tokens(contents, n_tokens)
    taken = {of.name for of in series.values()} | {loss_name} | known
    return RecordedRun(
        n_rows=n_rows,
        series=series,
        loss=None if losses is None else _loss(str(loss_name), losses, series, n_rows),
        settings=settings_of(contents.settings),
        labels=labels,
        token_ids=token_ids,
        whole_tokens=whole_tokens,
        parameter=parameter,
        device=_device(contents.settings),
        not_taken=sorted(name for name in contents.arrays if name not in taken),
    )


def single_run(contents: FileContents) -> Sequence[RecordedRun]:
    """Return the one run in a file that follows the rules, as a layout does."""
    return [run_of(contents)]


def _series(contents: FileContents) -> dict[str, Series]:
    """Return where the rows of each variable are."""
    found = {ours: contents.named(names) for ours, names in VARIABLES.items()}
    name, W = found["W"]
    assert W is not None  # else the file was not recognised
    if len(W.shape) != 3 or 0 in W.shape:
        raise NotAStoreError(f"{name} has shape {W.shape}, expected (step, token, dim)")
    n_rows = n_states = W.shape[0]
    series = {}
    for ours in ("W", "exp_avg", "exp_avg_sq", "grad"):
        name, array = found[ours]
        if name is None or array is None:
            continue
        if array.native is None:
            raise NotAStoreError(f"{name} is {array.dtype}, expected floating-point numbers")
        if array.shape[1:] != W.shape[1:]:
            raise NotAStoreError(
                f"{name} has shape {array.shape}, expected {W.shape} or "
                f"{(n_rows - 1, *W.shape[1:])} beside W"
            )
        shift = _shift(str(name), len_ := array.shape[0], n_rows, n_states, is_grad=ours == "grad")
        if ours.startswith("exp_avg"):
            n_states = len_ + shift
        first = 1 if ours == "grad" else shift  # no gradient led to the initial state
        series[ours] = Series(array, str(name), shift, range(first, len_ + shift))
    return {ours: series[ours] for ours in VARIABLES if ours in series}


def _shift(name: str, length: int, n_rows: int, n_states: int, *, is_grad: bool) -> int:
    """Return the row of the run that the first row of a series is.

    States may have been recorded of the first steps only, and then the gradient was, too.
    """
    if length == n_rows or (length == n_states < n_rows):
        return 0
    if length == n_rows - 1 or (is_grad and length == n_states - 1):
        return 1
    if not is_grad and length < n_rows:
        return 0
    raise NotAStoreError(
        f"{name} has {length:,} rows beside {n_rows:,} of W, expected as many (steps 0 to "
        f"{n_rows - 1:,}) or one less (steps 1 to {n_rows - 1:,})"
    )


def _loss(name: str, losses: FileArray, series: Mapping[str, Series], n_rows: int) -> np.ndarray:
    """Return the loss of each row; 0.0 of the initial state stands for none."""
    if len(losses.shape) != 1 or losses.shape[0] not in (n_rows, n_rows - 1):
        raise NotAStoreError(
            f"{name} has shape {losses.shape}, expected ({n_rows},) or ({n_rows - 1},) beside W"
        )
    if losses.native is None:
        raise NotAStoreError(f"{name} is {losses.dtype}, expected floating-point numbers")
    found = np.full(n_rows, np.nan)
    found[n_rows - losses.shape[0] :] = decode(whole(losses), losses.native, np.float64)
    if found[0] == 0:
        found[0] = np.nan
    return found


def _tokens(
    contents: FileContents, n_tokens: int
) -> tuple[np.ndarray | None, TokenLabels, int | None]:
    """Return which rows of the parameter are there, their labels, and how many rows it has.

    A file may have the dead tokens only: as many as its mask says.
    """
    known = {name: whole(of) for name, of in contents.arrays.items() if name in LABEL_NAMES}
    masks = {name: of for name, of in known.items() if name.endswith("mask") or "counts" in name}
    n_whole = next((len(of) for of in masks.values()), None)
    vocab_size = contents.settings.get("vocab_size")
    ids = next((known[name] for name in TOKEN_IDS if name in known), None)
    if n_whole is None:
        last = -1 if ids is None else int(ids.max(initial=-1))
        n_whole = vocab_size if isinstance(vocab_size, int) else max(n_tokens, last + 1)
    try:
        labels = labels_from(known, max(n_whole, n_tokens))
    except CorpusError as error:
        raise CorpusError(f"the token labels of {contents.path}: {error}") from error
    if n_whole <= n_tokens and (ids is None or len(ids) != n_tokens or n_whole == n_tokens):
        return None, labels, None
    if ids is None and labels.dead is not None:
        ids = np.flatnonzero(labels.dead)
    if ids is None or len(ids) != n_tokens:
        raise NotAStoreError(
            f"W has {n_tokens:,} tokens, and the file says that there are {n_whole:,}, but not "
            "which of them these are"
        )
    ids = ids.astype(np.int64)
    if (np.diff(ids) <= 0).any():
        raise NotAStoreError("the ids of its tokens are not ascending")
    return ids, labels.of(ids), n_whole


def _device(settings: Mapping[str, Json]) -> str:
    device = settings.get("device")
    known = isinstance(device, str) and device.partition(":")[0] in ("cpu", "cuda", "mps")
    return str(device) if known else "unknown"


def settings_of(found: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings of a run under our names, as far as a file has them.

    Raises NotAStoreError if one has two values, or a hyper-parameter is no finite number.
    """
    known: dict[str, Json] = {}
    for ours, names in SETTINGS.items():
        values = [found[name] for name in names if name in found]
        if len({repr(value) for value in values}) > 1:
            raise NotAStoreError(f"it has several values of {' and '.join(names)}: {values}")
        if values:
            known[ours] = values[0]
    betas = found.get("betas", found.get("adam_betas"))
    if isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2:
        known = {"beta1": betas[0], "beta2": betas[1]} | known
    for name in HYPERPARAMETERS.values():
        value = known.get(name, 0.0)
        if not _is_finite(value):
            spelled = next((of for of in SETTINGS[name] if of in found), name)
            raise NotAStoreError(f"{spelled} is {value}, expected a finite number")
    return {
        name: value
        for name, value in known.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


def _is_finite(value: Json) -> bool:
    """Return whether a setting is a number that is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer beyond float64
        return False
