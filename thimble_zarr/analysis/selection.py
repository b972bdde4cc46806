"""Selections as people write them: `seed*/run.zarr`, `dead`, `17,42`, `text: the`, `100:200`.

Here ids of tokens become positions among those that were recorded, and steps become rows. What
computes knows positions and rows only.
"""

import functools
import glob
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from thimble_zarr.analysis.compute.source import Selected, Source
from thimble_zarr.analysis.summary.place import is_summary
from thimble_zarr.errors import ConfigError, NotAStoreError, SelectionError
from thimble_zarr.format.indexing import Indices, as_range
from thimble_zarr.format.labels import printable
from thimble_zarr.format.location import Location, Url, located

_WORDS = ("all", "live", "dead")


def select(
    source: Source, tokens: str | None, steps: str | None
) -> tuple[Selected, dict[str, Selected]]:
    """Select steps of the tokens of one subset or several; return all together, and each by name.

    `tokens` are `all`, `live`, `dead`, ids separated by commas, `@FILE` with ids separated by white
    space or commas, or `text:` and a token's exact text, as `ds.text` has it. Or several subsets
    separated by commas: words, and besides them `@FILE`. None means `dead` where it is known which
    tokens are, and an optimizer steps each element by itself; else `all`. A parameter without
    tokens has only `all`, its rows. `steps` are `A:B`, both inclusive as labels are in xarray;
    either may be left out. A single `A` is that step alone, and None means every step. Raises
    SelectionError if they cannot be read, are not there, or are empty.
    """
    schema = source.reader.schema
    if schema.has_tokens:
        positions = dict(select_tokens(source, part) for part in _subsets(tokens))
    elif tokens in (None, "all"):
        positions = {"all": np.arange(len(source.token_ids))}
    else:
        raise SelectionError(
            f"--tokens {tokens}: the parameter {schema.parameter or 'of this run'} has no tokens, "
            f"but dims ({', '.join(schema.dims)}); choose others with --parameter, or leave "
            "--tokens out"
        )
    whole = Selected(source, select_steps(source, steps), range(0), range(schema.n_dims))
    subsets = {name: replace(whole, tokens=as_range(of)) for name, of in positions.items()}
    every = functools.reduce(np.union1d, positions.values())
    return replace(whole, tokens=as_range(every)), subsets


def _subsets(spec: str | None) -> list[str | None]:
    """Cut a list of subsets; it is one if a part of it is a word, for ids and texts have none."""
    if spec is None or spec.startswith("text:"):
        return [spec]
    parts = [part.strip() for part in spec.split(",")]
    if len(parts) < 2 or not {*parts} & {*_WORDS}:
        return [spec]
    for part in parts:
        if part not in _WORDS and not part.startswith("@"):
            raise SelectionError(
                f"--tokens {spec}: {part!r} cannot be one of several subsets; expected all, live, "
                "dead or @FILE"
            )
    return list(dict.fromkeys(parts))


def select_tokens(source: Source, spec: str | None) -> tuple[str, np.ndarray]:
    """Return a subset's name, and where its tokens are among the recorded ones, ascending."""
    if spec is None:
        dead, is_elementwise = source.labels.dead, source.reader.schema.optimizer.ELEMENTWISE
        spec = "dead" if is_elementwise and dead is not None and dead.any() else "all"
    if spec == "all":
        return spec, np.arange(len(source.token_ids))
    if spec in _WORDS:
        mask = source.labels.live if spec == "live" else source.labels.dead
        if mask is None:
            raise SelectionError(
                f"the run does not say which tokens are {spec}; record it with token counts "
                "(`labels=` of Recorder), or select ids"
            )
        positions = np.flatnonzero(mask)
    elif spec.startswith("text:"):
        positions = _with_text(source, spec.removeprefix("text:"))
    else:
        positions = _with_ids(source, spec)
    if len(positions) == 0:
        raise SelectionError(
            f"no token is selected: --tokens {spec or repr(spec)} is empty in this run"
        )
    return spec, positions


def _with_text(source: Source, text: str) -> np.ndarray:
    texts = source.labels.text
    if texts is None:
        raise SelectionError("the run does not record the tokens' texts; select ids instead")
    positions = np.flatnonzero([text in (known, printable(known)) for known in texts])
    if len(positions) == 0:
        near = [repr(known) for known in texts if text and text.strip() == known.strip()]
        hint = f"; there is {', '.join(near[:5])}" if near else ""
        raise SelectionError(f"no token has the text {text!r}{hint}")
    return positions


def _with_ids(source: Source, spec: str) -> np.ndarray:
    written, recorded = spec, source.token_ids
    if spec.startswith("@"):
        try:
            written = Path(spec[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SelectionError(f"cannot read token ids from {spec[1:]}: {reason}") from error
    try:
        ids = np.array([int(word) for word in written.replace(",", " ").split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise SelectionError(
            f"--tokens {spec}: expected all, live, dead, ids such as 17,42, @FILE or text:TEXT"
        ) from error
    if len(unknown := ids[~np.isin(ids, recorded)]):
        first, last = int(recorded[0]), int(recorded[-1])
        some = f"{len(recorded):,} of the " if len(recorded) < last - first + 1 else ""
        raise SelectionError(
            f"token {unknown[0]} is not in this run, which has {some}tokens {first} to {last}"
        )
    return np.searchsorted(recorded, np.unique(ids))


def select_steps(source: Source, spec: str | None) -> Indices:
    """Return the rows of a range of steps."""
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


def stores_at(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the paths that patterns match, sorted and without duplicates.

    What exists by its name is no pattern, and no address is. Patterns match no summaries, which lie
    beside their runs with names of stores; else whether there is a store is not looked at. Raises
    NotAStoreError if a pattern matches nothing, and ConfigError if there are no paths.
    """
    patterns = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not patterns:
        raise ConfigError("no store was named; expected a path or a pattern such as seed*/run.zarr")
    return sorted({path for pattern in patterns for path in _matches(located(pattern))})


def _matches(pattern: Location) -> list[str]:
    if isinstance(pattern, Url) or pattern.exists() or not glob.has_magic(str(pattern)):
        return [str(pattern)]
    found = glob.glob(str(pattern), recursive=True)  # noqa: PTH207  # pathlib has no absolute ones
    paths = [path for path in found if not is_summary(path)]  # which lie beside their runs
    if not paths:
        raise NotAStoreError(f"no path matches {pattern}")
    return [str(Path(path)) for path in paths]
