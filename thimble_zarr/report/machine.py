"""What a check found, as machines read it: csv and json, with every step."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from thimble_zarr.analysis.result import ParameterResult

Labelled = tuple[Mapping[str, str], Mapping[str, np.ndarray]]
"""What every row of a table has in common, by name, and the columns."""


def as_json(results: Sequence[ParameterResult]) -> str:
    """Return strict JSON: what `to_json` of a result returns, of several a list of all."""
    found = [of.to_json() for of in results]
    content = found[0] if len(found) == 1 else found
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_csv(results: Sequence[ParameterResult]) -> str:
    """Return every step, and first of which store, parameter and subset if there are several."""
    several = any(of.parameter for of in results if of.subsets)
    tables = []
    for of in results:
        labels = {} if len(results) == 1 else {"store": str(of.store)}
        labels |= {"parameter": of.parameter or ""} if labels and several else {}
        tables += [(labels | of.label(subset), subset.columns) for subset in of.subsets]
    return csv_text(tables) if tables else ""


def csv_text(tables: Sequence[Labelled]) -> str:
    """Return every row of some tables, empty where one lacks a column, or is NaN."""
    names = dict.fromkeys(name for table in tables for part in table for name in part)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for labels, columns in tables:
        cells: dict[str, Iterable[object]] = {n: itertools.repeat(labels[n]) for n in labels}
        for name, values in columns.items():
            cells[name] = ("" if value != value else value for value in values.tolist())
        missing = itertools.repeat("")
        writer.writerows(zip(*(cells.get(name, missing) for name in names), strict=False))
    return file.getvalue()
