"""`diff`: where do two runs first differ, and what came first?"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from thimble_zarr.analysis.diff.cause import Inquiry, in_order
from thimble_zarr.analysis.diff.pair import Pair
from thimble_zarr.analysis.diff.result import Compared, DiffResult, Growth, ParameterDiff
from thimble_zarr.analysis.diff.scan import Scan, first_of_scalars, growth
from thimble_zarr.analysis.diff.settings import settings
from thimble_zarr.errors import SelectionError
from thimble_zarr.format.location import Location, located
from thimble_zarr.format.reader import Reader
from thimble_zarr.sources.open import open_recording

Reach = Callable[[int, int], object]


def diff(
    a: str | Path,
    b: str | Path,
    *,
    parameters: str | Sequence[str] = (),
    values: bool = False,
    replay: bool = True,
    progress: Reach | None = None,
) -> DiffResult:
    """Find where two runs first differ, what came first, and how it grows.

    Bits are compared, of the steps, tokens and variables that both runs have; NaN, which is
    missing, equals NaN of the same bits. Variables of other dtypes are compared as exact numbers.
    Chunks that were recorded with equal checksums count as equal and are not decoded.

    Parameters
    ----------
    a, b
        Stores, or safetensors or HDF5 files.
    parameters
        Names or patterns such as `*.weight`, or `NAME_A=NAME_B` of one that has another name in
        each; all that both have by default. A single parameter is compared whatever it is called.
    values
        Decode every chunk, and do not rely on the recorded checksums: what was altered on disk
        after it was recorded is then seen.
    replay
        Whether torch may take the first step that differs again, in both runs, to tell which of
        them was changed by something else than its step.
    progress
        Called with how many steps of a parameter were gone through, and how many there are.

    Raises
    ------
    ThimbleError
        If a run cannot be read, or they have nothing in common that can be compared.

    Examples
    --------
    >>> import thimble_zarr
    >>> result = thimble_zarr.diff("run.zarr", "run.zarr")
    >>> result.is_equal
    True
    >>> result.parameters[0].compared.by_value
    0
    """
    paths = located(a), located(b)
    patterns = [parameters] if isinstance(parameters, str) else parameters
    pairs, only = _paired(paths, patterns)
    reach = progress or (lambda n_done, n_steps: None)
    found = tuple(
        _compared(Pair.of(*pair), paths, values=values, replay=replay, reach=reach)
        for pair in pairs
    )
    return DiffResult(*paths, found, *only)


def _paired(
    paths: tuple[Location, Location], patterns: Sequence[str]
) -> tuple[list[tuple[Reader, Reader]], tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return parameters by pairs, and the names of those that only one run has."""
    every = [
        {reader.schema.parameter or "" for reader in open_recording(path)} if patterns else set()
        for path in paths
    ]
    names = [_both_names(pattern, *every) for pattern in patterns]
    a, b = (
        {
            reader.schema.parameter or "": reader
            for reader in open_recording(path, parameters=[of[side] for of in names])
        }
        for side, path in enumerate(paths)
    )
    renamed = {one: other for one, other in names if one != other}
    if len(a) == len(b) == 1:
        renamed = dict(zip(a, b, strict=True))
    pairs = {name: renamed.get(name, name) for name in a if renamed.get(name, name) in b}
    if not pairs:
        raise SelectionError(
            f"no parameter is in both: {paths[0]} has {_list(a)}, and {paths[1]} has {_list(b)}; "
            "name two that are to be compared, --parameter NAME_A=NAME_B"
        )
    only_a = tuple(name for name in a if name not in pairs)
    only_b = tuple(name for name in b if name not in pairs.values())
    return [(a[one], b[other]) for one, other in pairs.items()], (only_a, only_b)


def _both_names(pattern: str, in_a: set[str], in_b: set[str]) -> tuple[str, str]:
    """Return a pattern for each run: the same, or what is before and after `=`.

    Names may have a `=`, too: those that are there go first.
    """
    parts = pattern.split("=")
    cuts = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    known = [(a, b) for a, b in ((pattern, pattern), *cuts) if a in in_a and b in in_b]
    return (known or cuts or [(pattern, pattern)])[0]


def _list(names: Sequence[str] | dict[str, Reader]) -> str:
    return ", ".join(name or "one without a name" for name in itertools.islice(names, 8))


def _compared(
    pair: Pair, paths: tuple[Location, Location], *, values: bool, replay: bool, reach: Reach
) -> ParameterDiff:
    a, b = (reader.schema for reader in pair.readers)
    scan = Scan(pair, by_values=values)
    differences = in_order(pair, [*first_of_scalars(pair), *scan.first_differences(reach)])
    other, cause = settings(a, b), None
    grows: tuple[Growth, ...] = ()
    if differences:
        cause = Inquiry(pair, paths, differences, other, replay=replay).cause()
        of_arrays = [of.step for of in differences if of.token is not None]
        grows = tuple(growth(pair, min(of_arrays))) if of_arrays else ()
    return ParameterDiff(
        parameters=(a.parameter, b.parameter),
        schemas=(a, b),
        compared=_what(pair, scan),
        differences=differences,
        growth=grows,
        settings=other,
        cause=cause,
    )


def _what(pair: Pair, scan: Scan) -> Compared:
    n_a, n_b = (len(source.steps) for source in pair.sources)
    natives = {name: pair.natives(name) for name in pair.variables}
    return Compared(
        steps=(int(pair.steps[0]), int(pair.steps[-1])),
        n_steps=len(pair.steps),
        n_only_a=n_a - len(pair.steps),
        n_only_b=n_b - len(pair.steps),
        n_tokens=len(pair.ids),
        variables=pair.variables,
        other_dtypes=tuple(name for name, (a, b) in natives.items() if a != b),
        by_checksum=scan.by_checksum,
        by_value=scan.by_value,
    )
