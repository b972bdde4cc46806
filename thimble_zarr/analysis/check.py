"""`check`: does every recorded row follow from the one before?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thimble_zarr.analysis.audit.audit import Audit
from thimble_zarr.analysis.audit.table import tabulated
from thimble_zarr.analysis.check_result import CheckResult, ParameterResult, SubsetResult
from thimble_zarr.analysis.compute.run import Progress, Resources, computed
from thimble_zarr.analysis.compute.source import PORTABLE, TORCH, Source
from thimble_zarr.analysis.compute.variables import missing_inputs
from thimble_zarr.analysis.findings import find_altered, find_causes, find_missing
from thimble_zarr.analysis.health.conditions import concerns_of
from thimble_zarr.analysis.health.measurements import measured
from thimble_zarr.analysis.selection import select
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.errors import ConfigError, ThimbleError
from thimble_zarr.format.location import Location, located
from thimble_zarr.format.schema import Schema
from thimble_zarr.sources.open import open_recording


def check(
    store: str | Path,
    *,
    tokens: str | Sequence[int] | np.ndarray | None = None,
    steps: str | None = None,
    parameters: str | Sequence[str] = (),
    formula: bool = True,
    replay: bool | str = True,
    extended: bool = False,
    device: str | None = None,
    token_mask: Path | None = None,
    learning_rate: str | None = None,
    memory_bytes: int | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Check that every recorded row of a store follows from the row before.

    The formula predicts each change of the weights from the recorded states, and each step is taken
    again and must give the recorded bits (`replay`). If it does not, the cause is looked for. All
    subsets are checked in one pass over the store.

    Besides, `health` of the result tells what no fault makes but a person wants to know: a state
    that cannot decay, updates that are rounded away, a learning rate of 0, a gradient that
    explodes, a loss that is not finite. What needs arrays is looked for in a sample of steps and
    tokens. It does not change whether the record holds.

    Parameters
    ----------
    store
        A store, or a safetensors or HDF5 file that is read in place.
    tokens
        Which tokens: `all`, `live`, `dead`, ids, `@FILE` with ids, or `text:` and a token's text;
        or several subsets, such as `dead,live,all`. None means `dead` where it is known which
        tokens are, else `all`; `all` too where a step needs the whole parameter (Muon, Adafactor),
        of which parts are checked as far as they can be.
    steps
        First and last step, such as `100:200`; all by default.
    parameters
        Names or patterns such as `*.weight`; all by default.
    formula, replay
        Whether to compare with the formula, and whether to take the steps again. Without what it
        needs the replay is left out. With `portable`, which True stands for, a portable program
        takes the steps (`optim.programs`), and torch those that end otherwise than recorded; torch
        takes all where there is no such program or it cannot be compiled. With `torch` it always
        does.
    extended
        Whether to add the columns `audit.table.EXTENDED`.
    device
        Where to replay, as torch names it. By default where the run was recorded, if this machine
        has it, else the CPU.
    token_mask, learning_rate
        The token mask of a file, and its learning rate by step (`3e-4`, `linear:1e-3:1000`, or a
        file of numbers), where it does not have them.
    memory_bytes, workers, scheduler
        What it may use (`Resources`): by default a share of the free memory, and a process for each
        CPU or the workers of an active `distributed.Client`.
    progress
        Called with how many parts of a parameter are done, and how many there are.

    Raises
    ------
    ThimbleError
        If the store, or its only parameter, cannot be read or checked, or options do not go
        together. Of several parameters, those that cannot be checked have an `error` instead.

    Examples
    --------
    >>> import thimble_zarr
    >>> result = thimble_zarr.check("run.zarr", tokens="dead")
    >>> result.holds
    True
    >>> print(result.verdict)
    HOLDS to the bit: replayed by adamw-single/1, all ... values each of W, exp_avg and ...
    >>> list(result.table.columns)[:3]
    ['t', 'norm_predicted', 'norm_observed']
    """
    if tokens is not None and not isinstance(tokens, str):
        tokens = ",".join(map(str, tokens))
    patterns = [parameters] if isinstance(parameters, str) else parameters
    by = _replayed_by(device, replay=replay)
    asked = {"formula": formula, "replay": bool(replay), "extended": extended}
    resources = Resources(memory_bytes=memory_bytes, workers=workers, scheduler=scheduler)
    readers = open_recording(
        store, parameters=patterns, token_mask=token_mask, learning_rate=learning_rate
    )
    results = []
    for reader in readers:
        where = located(store), reader.group or None
        try:
            source = Source.of(reader, device, by)
            subsets = _check(source, (tokens, steps), where, resources, progress, **asked)
            results.append(ParameterResult(*where, subsets=subsets))
        except (ThimbleError, OSError) as error:
            if len(readers) == 1:
                raise
            results.append(ParameterResult(*where, error=error))
    return CheckResult(located(store), (*results,))


def _replayed_by(device: str | None, *, replay: bool | str) -> str:
    """Return what takes the steps, if anything does."""
    if device is not None and not replay:
        raise ConfigError(
            "device (--device) chooses where to replay, and replay=False (--no-replay) turns it off"
        )
    by = PORTABLE if isinstance(replay, bool) else replay
    if by not in (PORTABLE, TORCH):
        raise ConfigError(
            f"replay is {replay!r}, and can be {PORTABLE!r}, {TORCH!r}, True or False"
        )
    return by


def _check(
    source: Source,
    selection: tuple[str | None, str | None],
    where: tuple[Location, str | None],
    resources: Resources,
    progress: Progress | None,
    *,
    formula: bool,
    replay: bool,
    extended: bool,
) -> tuple[SubsetResult, ...]:
    """Check the subsets of a parameter in one pass."""
    schema = source.reader.schema
    selected, subsets = select(source, *selection)
    formula, replay, looks_for_causes = _possible(schema, formula=formula, replay=replay)
    at = {name: subset.tokens for name, subset in subsets.items()}
    audit = Audit.of(selected, formula=formula, replay=replay, extended=extended, subsets=at)
    with computed(audit.reduction, resources, replay=replay, progress=progress) as numbers:
        measurements = measured([*subsets.values()])  # while others compute
        checked = audit.reduction.selected
        altered = find_altered(checked, before_block=numbers.reach) if looks_for_causes else ()
        tables = tabulated(audit, numbers.result())
    results, steps = [], selected.steps
    for table, known, (name, subset) in zip(tables, measurements, subsets.items(), strict=True):
        findings = find_causes(subset, table, altered) if looks_for_causes else find_missing(subset)
        of_subset = SubsetResult(
            *where,
            schema=schema,
            subset=name,
            n_tokens=len(subset.tokens),
            steps=(int(steps[0]), int(steps[-1])),
            n_recorded=int((steps > 0).sum()),
            extended=extended,
            numbers=table,
            findings=(*findings,),
            health=concerns_of(known),
            verdict=verdict(table, findings, source.reader),
        )
        results.append(of_subset)
    return (*results,)


def _possible(schema: Schema, *, formula: bool, replay: bool) -> tuple[bool, bool, bool]:
    """Return what can be checked of what was asked for, and whether causes are looked for."""
    can_replay = schema.optimizer.CAN_BE_REPLAYED
    formula, replay = formula and schema.optimizer.formula is not None, replay and can_replay
    if formula:  # else there is nothing to do without the replay, and an error says why
        replay = replay and not missing_inputs("unexplained", schema)
    return formula, replay, replay or not can_replay
