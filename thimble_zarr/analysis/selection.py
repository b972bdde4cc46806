"""Selections as people write them: `dead`, `17,42`, `@ids.txt`, `text: the`, `100:200`."""

import functools
from pathlib import Path

import numpy as np
import xarray as xr

from thimble_zarr.analysis.accounting import lazy_variable
from thimble_zarr.errors import SelectionError

_WORDS = ("all", "live", "dead")


def select_subsets(ds: xr.Dataset, spec: str | None) -> tuple[xr.Dataset, dict[str, np.ndarray]]:
    """Select the tokens of one subset or of several.

    Parameters
    ----------
    ds
        A dataset from `open_dataset`.
    spec
        As `select_tokens` takes it, or several subsets separated by commas: `all`, `live` or
        `dead`, and besides them `@FILE`.

    Returns
    -------
    xarray.Dataset
        The tokens of all subsets, lazy.
    dict of str to numpy.ndarray
        By name, the ids of each subset.

    Raises
    ------
    SelectionError
        If a subset cannot be read, names a token that is not there, or is empty, or the parameter
        has no tokens: then there is only `all`, whose ids are those of its rows.
    """
    if "token" not in ds.dims:
        schema = lazy_variable(ds).source.reader.schema
        if spec not in (None, "all"):
            raise SelectionError(
                f"--tokens {spec}: the parameter {schema.parameter or 'of this run'} has no "
                f"tokens, but dims ({', '.join(schema.dims)}); choose others with --parameter, or "
                "leave --tokens out"
            )
        return ds, {"all": lazy_variable(ds).source.token_ids}
    selected = [select_tokens(ds, part) for part in _subsets(spec)]
    subsets = {name: of.token.values for of, name in selected}
    if len(selected) == 1:
        return selected[0][0], subsets
    tokens = functools.reduce(np.union1d, subsets.values())
    return (ds if len(tokens) == ds.sizes["token"] else ds.sel(token=tokens)), subsets


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


def select_tokens(ds: xr.Dataset, spec: str | None) -> tuple[xr.Dataset, str]:
    """Select tokens.

    Parameters
    ----------
    ds
        A dataset from `open_dataset`.
    spec
        `all`, `live`, `dead`, ids separated by commas, `@FILE` with ids separated by white space
        or commas, or `text:` followed by a token's exact text. None means dead where it is known
        which tokens are, else all.

    Returns
    -------
    xarray.Dataset
        The selected tokens, lazy.
    str
        The subset's name, for a title.

    Raises
    ------
    SelectionError
        If the selection cannot be read, names a token that is not there, or is empty.
    """
    if spec is None:
        spec = "dead" if "dead" in ds.coords and bool(ds.dead.any()) else "all"
    if spec == "all":
        return ds, spec
    if spec in ("live", "dead"):
        tokens = _labelled(ds, spec)
    elif spec.startswith("text:"):
        tokens = _with_text(ds, spec.removeprefix("text:"))
    else:
        tokens = _ids(ds, spec)
    if len(tokens) == 0:
        raise SelectionError(f"no token is selected: --tokens {spec} is empty in this run")
    return ds.sel(token=tokens), spec


def _labelled(ds: xr.Dataset, label: str) -> np.ndarray:
    if label not in ds.coords:
        raise SelectionError(
            f"the run does not say which tokens are {label}; record it with token counts "
            "(`labels=` of Recorder), or select ids"
        )
    tokens: np.ndarray = ds.token.values[ds[label].values]
    return tokens


def _with_text(ds: xr.Dataset, text: str) -> np.ndarray:
    if "text" not in ds.coords:
        raise SelectionError("the run does not record the tokens' texts; select ids instead")
    texts = ds.text.values
    tokens: np.ndarray = ds.token.values[texts == text]
    if len(tokens) == 0:
        near = [repr(known) for known in texts if text and text.strip() == known.strip()]
        hint = f"; there is {', '.join(near[:5])}" if near else ""
        raise SelectionError(f"no token has the text {text!r}{hint}")
    return tokens


def _ids(ds: xr.Dataset, spec: str) -> np.ndarray:
    written = spec
    if spec.startswith("@"):
        try:
            written = Path(spec[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SelectionError(f"cannot read token ids from {spec[1:]}: {error}") from error
    try:
        ids = np.array([int(word) for word in written.replace(",", " ").split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise SelectionError(
            f"--tokens {spec}: expected all, live, dead, ids such as 17,42, @FILE or text:TEXT"
        ) from error
    known = np.isin(ids, ds.token.values)
    if not known.all():
        raise SelectionError(
            f"token {ids[~known][0]} is not in this run, which has {_of_tokens(ds)}"
        )
    return np.unique(ids)


def _of_tokens(ds: xr.Dataset) -> str:
    first, last = int(ds.token[0]), int(ds.token[-1])
    some = ds.token.size < last - first + 1
    return f"{f'{ds.token.size:,} of the ' if some else ''}tokens {first} to {last}"


def select_steps(ds: xr.Dataset, spec: str | None) -> xr.Dataset:
    """Select a range of steps.

    Parameters
    ----------
    ds
        A dataset from `open_dataset`.
    spec
        `A:B`, both inclusive as labels are in xarray; either may be left out. A single `A` is that
        step alone. None means every step.

    Returns
    -------
    xarray.Dataset
        The selected steps, lazy.

    Raises
    ------
    SelectionError
        If the range cannot be read, is empty, or is not within the run.
    """
    if spec is None:
        return ds
    last = int(ds.step[-1])
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
    selected = ds.sel(step=slice(first_step, last_step))
    if selected.sizes["step"] == 0:
        after = int(np.searchsorted(ds.step.values, first_step))
        near = ds.step.values[max(0, after - 1) : after + 1]
        raise SelectionError(
            f"--steps {spec}: none of them was recorded; near them are "
            f"{' and '.join(map(str, near))}"
        )
    return selected
