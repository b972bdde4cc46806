"""Where two runs differ: tables and words for people."""

import json
import math

from thimble_zarr.analysis.diff.result import Difference, DiffResult, Growth, ParameterDiff
from thimble_zarr.format.schema import Json, Schema
from thimble_zarr.report.text import aligned, text_width, wrapped

_MAX_SETTING = 40
"""Characters of a setting that a table shows."""

_MOST_READ = 10**9


def as_text(result: DiffResult) -> str:
    """Return what people read: all of the parameter that differs first, of others a line each."""
    shown = result.diverged or result.parameters[0]
    parts = [_title(result, shown)]
    if len(result.parameters) > 1:
        parts.append(_overview(result))
    if not shown.is_equal:
        parts += [_first_differences(shown), *([_growth(shown)] if shown.growth else [])]
    if shown.settings:
        parts.append(_settings(shown))
    return "\n\n".join([*parts, in_words(result)]) + "\n"


def in_words(result: DiffResult) -> str:
    """Return the answer in words."""
    cause = result.cause
    if cause is None:
        return wrapped(_equal(result))
    several = len(result.parameters) > 1 and result.diverged
    of = f" of {several.name}" if several else ""
    when = f"from step {cause.step:,} on" if cause.step else "from the beginning"
    return wrapped(f"DIFFERENT {when}, {cause.variable}{of} first: {cause.code}. {cause.message}")


def _equal(result: DiffResult) -> str:
    """Say what is equal, and of what was not decoded only that it was recorded so."""
    parameters = result.parameters
    words = "EQUAL: all values are the same, bit by bit"
    if any(of.compared.by_checksum for of in parameters):
        words = "EQUAL as recorded: all values were the same, bit by bit, when they were recorded"
    elif any(of.compared.other_dtypes for of in parameters):
        words = "EQUAL: all values are the same numbers, in other dtypes"
    if any(of.compared.n_only_a or of.compared.n_only_b for of in parameters):
        words += ", at the steps that both have"
    if any(of.settings for of in parameters):
        words += "; what the runs say of themselves is not the same"
    return f"{words}."


def _title(result: DiffResult, shown: ParameterDiff) -> str:
    lines = [("A", str(result.a)), ("B", str(result.b))]
    if len(result.parameters) == 1 and shown.parameters != (None, None):
        lines.append(("Parameter", shown.name))
    lines.append(("Compared", _compared(shown)))
    lines.append(("Chunks", _chunks(result)))
    lines += [
        (f"Only {run}", ", ".join(names))
        for run, names in (("A", result.only_a), ("B", result.only_b))
        if names
    ]
    return "\n".join(wrapped(f"{name:<10} {text}", indent=" " * 11) for name, text in lines)


def _compared(of: ParameterDiff) -> str:
    compared, schema = of.compared, of.schemas[0]
    first, last = compared.steps
    words = f"{compared.n_steps:,} rows, of steps {first:,} to {last:,}"
    more = [
        f"{n:,} more in {run}"
        for run, n in (("A", compared.n_only_a), ("B", compared.n_only_b))
        if n
    ]
    words += f" ({', '.join(more)})" if more else ""
    words += f"; {compared.n_tokens:,} {schema.row_name}s; {', '.join(compared.variables)}"
    if compared.other_dtypes:
        names = (
            f"{name} ({of.schemas[0].dtypes[name]}, {of.schemas[1].dtypes[name]})"
            for name in compared.other_dtypes
        )
        words += f"; as exact numbers, of other dtypes: {', '.join(names)}"
    return words


def _chunks(result: DiffResult) -> str:
    by_checksum = sum(of.compared.by_checksum for of in result.parameters)
    by_value = sum(of.compared.by_value for of in result.parameters)
    words = f"{by_checksum:,} equal by the checksums they were recorded with"
    if by_checksum:
        words += " (--values decodes them, verify tells if they still are)"
    return f"{words}, {by_value:,} compared by value"


def _overview(result: DiffResult) -> str:
    heads = ("parameter", "steps", "first difference", "")
    lines = []
    for of in result.parameters:
        first, cause = of.first, of.cause
        where = f"step {first.step:,}, {first.variable}" if first else "none"
        steps = f"{of.compared.steps[0]:,} to {of.compared.steps[1]:,}"
        lines.append((of.name, steps, where, cause.code if cause else "EQUAL"))
    return aligned([heads, *lines], width=text_width())


def _first_differences(of: ParameterDiff) -> str:
    heads = ("first difference", "step", "at", "A", "B", "ULP", "differ")
    lines = [
        (
            one.variable,
            f"{one.step:,}",
            _place(of.schemas[0], one),
            _number(one.a),
            _number(one.b),
            "-" if one.ulp is None else _count(one.ulp),
            "-" if one.token is None else _share(one.n_different, one.n_elements),
        )
        for one in of.differences
    ]
    return aligned([heads, *lines], width=text_width())


def _place(schema: Schema, one: Difference) -> str:
    return "-" if one.token is None else schema.place(one.token, one.dim)


def _number(value: float) -> str:
    return "missing" if math.isnan(value) else f"{value:.9g}"


def _count(n: float) -> str:
    """Return how many, and of more than people read at a glance about how many."""
    return f"{n:,.0f}" if n < _MOST_READ else f"{n:.3g}"


def _share(part: int, whole: int) -> str:
    """Return a share in percent, never 0 of what is some and never 100 of what is not all."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 1e-4), 99.99):.4g} %"


def _growth(of: ParameterDiff) -> str:
    """Return a line a step: of each variable the share that differs, and how far it is apart."""
    lines: dict[int, dict[str, Growth]] = {}
    for one in of.growth:
        lines.setdefault(one.step, {})[one.variable] = one
    names = of.compared.variables
    heads = ("step", *(cell for name in names for cell in (name, "apart")))
    rows = [
        (
            f"{step:,}",
            *(
                cell
                for name in names
                for cell in (
                    _share(line[name].n_different, line[name].n_elements),
                    f"{line[name].relative:.3g}",
                )
            ),
        )
        for step, line in lines.items()
    ]
    title = wrapped(
        "How it grows: elements that differ, and the norm of the difference over that of A"
    )
    return f"{title}\n{aligned([heads, *rows], width=text_width())}"


def _settings(of: ParameterDiff) -> str:
    lines = [(one.name, _setting(one.a), _setting(one.b)) for one in of.settings]
    return aligned([("what differs", "A", "B"), *lines], width=text_width())


def _setting(value: Json) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SETTING else f"{text[: _MAX_SETTING - 1]}…"
