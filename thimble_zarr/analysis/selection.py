"""Selections as people write them: `dead`, `17,42`, `@ids.txt`, `text: the`, `100:200`."""

import functools
from pathlib import Path

import numpy as np

from thimble_zarr.analysis.compute.windows import Selected, Source
from thimble_zarr.errors import SelectionError
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.labels import printable

_WORDS = ("all", "live", "dead")


def select(
    source: Source, tokens: str | None, steps: str | None
) -> tuple[Selected, dict[str, np.ndarray]]:
    """Select steps of the tokens of one subset or of several.

    Parameters
    ----------
    source
        The recording.
    tokens
        As `select_tokens` takes it, or several subsets separated by commas: `all`, `live` or
        `dead`, and besides them `@FILE`.
    steps
        As `select_steps` takes it.

    Returns
    -------
    Selected
        The tokens of all subsets.
    dict of str to numpy.ndarray
        By name, the ids of each subset.

    Raises
    ------
    SelectionError
        If a subset cannot be read, names a token that is not there, or is empty, or the parameter
        has no tokens: then there is only `all`, whose ids are those of its rows. Or if the steps
        cannot be selected.
    """
    schema = source.reader.schema
    if not schema.has_tokens:
        if tokens not in (None, "all"):
            raise SelectionError(
                f"--tokens {tokens}: the parameter {schema.parameter or 'of this run'} has no "
                f"tokens, but dims ({', '.join(schema.dims)}); choose others with --parameter, or "
                "leave --tokens out"
            )
        subsets = {"all": source.token_ids}
    else:
        subsets = dict(select_tokens(source, part) for part in _subsets(tokens))
    ids = functools.reduce(np.union1d, subsets.values())
    whole = Selected(source, select_steps(source, steps), range(0), range(schema.n_dims))
    return whole.of_ids(ids), subsets


def _subsets(spec: str | None) -> list[str | None]:
    """Cut a list of subsets; it is one if a part of it is a word, for ids and texts have none."""
    parts = [] if spec is None or spec.startswith("text:") else spec.split(",")
    parts = [part.strip() for part in parts]
    if len(parts) < 2 or not set(parts) & set(_WORDS):
        return [spec]
    for part in parts:
        if part not in _WORDS and not part.startswith("@"):
            raise SelectionError(
                f"--tokens {spec}: {part!r} cannot be one of several subsets; expected all, live, "
                "dead or @FILE"
            )
    return list(dict.fromkeys(parts))


def select_tokens(source: Source, spec: str | None) -> tuple[str, np.ndarray]:
    """Select tokens.

    Parameters
    ----------
    source
        A recording whose rows are tokens.
    spec
        `all`, `live`, `dead`, ids separated by commas, `@FILE` with ids separated by white space
        or commas, or `text:` followed by a token's exact text,
        as `ds.text` has it. None means dead where it is known
        which tokens are, else all.

    Returns
    -------
    str
        The subset's name, for a title.
    numpy.ndarray
        The ids of the tokens, int64, ascending.

    Raises
    ------
    SelectionError
        If the selection cannot be read, names a token that is not there, or is empty.
    """
    if spec is None:
        dead = source.labels.dead
        spec = "all" if dead is None or not dead.any() else "dead"
    if spec == "all":
        return spec, source.token_ids
    if spec in ("live", "dead"):
        tokens = _labelled(source, spec)
    elif spec.startswith("text:"):
        tokens = _with_text(source, spec.removeprefix("text:"))
    else:
        tokens = _ids(source, spec)
    if len(tokens) == 0:
        raise SelectionError(
            f"no token is selected: --tokens {spec or repr(spec)} is empty in this run"
        )
    return spec, tokens


def _labelled(source: Source, label: str) -> np.ndarray:
    mask = source.labels.live if label == "live" else source.labels.dead
    if mask is None:
        raise SelectionError(
            f"the run does not say which tokens are {label}; record it with token counts "
            "(`labels=` of Recorder), or select ids"
        )
    tokens: np.ndarray = source.token_ids[mask]
    return tokens


def _with_text(source: Source, text: str) -> np.ndarray:
    texts = source.labels.text
    if texts is None:
        raise SelectionError("the run does not record the tokens' texts; select ids instead")
    tokens: np.ndarray = source.token_ids[[text in (known, printable(known)) for known in texts]]
    if len(tokens) == 0:
        near = [repr(known) for known in texts if text and text.strip() == known.strip()]
        hint = f"; there is {', '.join(near[:5])}" if near else ""
        raise SelectionError(f"no token has the text {text!r}{hint}")
    return tokens


def _ids(source: Source, spec: str) -> np.ndarray:
    written = spec
    if spec.startswith("@"):
        try:
            written = Path(spec[1:]).read_text(encoding="utf-8")
        except OSError as error:
            reason = error.strerror
            raise SelectionError(f"cannot read token ids from {spec[1:]}: {reason}") from error
        except UnicodeDecodeError as error:
            raise SelectionError(f"cannot read token ids from {spec[1:]}: {error}") from error
    try:
        ids = np.array([int(word) for word in written.replace(",", " ").split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise SelectionError(
            f"--tokens {spec}: expected all, live, dead, ids such as 17,42, @FILE or text:TEXT"
        ) from error
    known = np.isin(ids, source.token_ids)
    if not known.all():
        raise SelectionError(
            f"token {ids[~known][0]} is not in this run, which has {_of_tokens(source.token_ids)}"
        )
    return np.unique(ids)


def _of_tokens(ids: np.ndarray) -> str:
    first, last = int(ids[0]), int(ids[-1])
    some = len(ids) < last - first + 1
    return f"{f'{len(ids):,} of the ' if some else ''}tokens {first} to {last}"


def select_steps(source: Source, spec: str | None) -> Indices:
    """Select a range of steps.

    Parameters
    ----------
    source
        The recording.
    spec
        `A:B`, both inclusive as labels are in xarray; either may be left out. A single `A` is that
        step alone. None means every step.

    Returns
    -------
    range or numpy.ndarray
        The rows of the selected steps.

    Raises
    ------
    SelectionError
        If the range cannot be read, is empty, or is not within the run.
    """
    recorded = source.steps
    if spec is None:
        return range(len(recorded))
    last = int(recorded[-1])
    start, colon, stop = spec.partition(":")
    try:
        first_step = int(start) if start or not colon else 1
        last_step = int(stop) if stop else last if colon else first_step
    except ValueError as error:
        raise SelectionError(f"--steps {spec}: expected A:B, for example 100:200") from error
    if stop and first_step > last_step:
        raise SelectionError(
            f"--steps {spec}: the first step, {first_step}, is after the last, {last_step}; "
            "expected A:B, for example 100:200"
        )
    if not 1 <= first_step <= last_step <= last:
        raise SelectionError(f"--steps {spec} is not within the recorded steps 1:{last}")
    start_row, stop_row = np.searchsorted(recorded, (first_step, last_step + 1)).tolist()
    if start_row == stop_row:
        near = recorded[max(0, start_row - 1) : start_row + 1]
        raise SelectionError(
            f"--steps {spec}: none of them was recorded; near them are "
            f"{' and '.join(map(str, near))}"
        )
    return range(start_row, stop_row)
