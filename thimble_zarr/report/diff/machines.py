"""Where two runs differ: csv and json for machines."""

import csv
import io
import json
from collections.abc import Iterator, Sequence

from thimble_zarr.analysis.diff.result import DiffResult, ParameterDiff


def as_json(result: DiffResult) -> str:
    """Return strict JSON: what `to_json` of the result returns."""
    return json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"


_COLUMNS = (
    *("parameter", "what", "variable", "step", "token", "dim", "a", "b"),
    *("n_different", "n_elements", "relative", "max_ulp"),
)


def as_csv(result: DiffResult) -> str:
    """Return the first differences, and how they grow: a line each, with which it is."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for of in result.parameters:
        for line in _lines(of):
            cells = ("" if cell is None or cell != cell else cell for cell in line)
            writer.writerow((of.name, *cells))
    return file.getvalue()


def _lines(of: ParameterDiff) -> Iterator[Sequence[object]]:
    for one in of.differences:
        where = "first", one.variable, one.step, one.token, one.dim
        yield *where, one.a, one.b, one.n_different, one.n_elements, None, one.ulp
    for at in of.growth:
        where = "growth", at.variable, at.step, None, None
        yield *where, None, None, at.n_different, at.n_elements, at.relative, at.max_ulp
