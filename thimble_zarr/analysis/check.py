"""`check`: does every recorded row follow from the one before?"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np

from thimble_zarr.analysis.audit.audit import Audit
from thimble_zarr.analysis.audit.table import tabulated
from thimble_zarr.analysis.causes.findings import find_altered, find_causes
from thimble_zarr.analysis.compute.run import Resources, computed
from thimble_zarr.analysis.compute.variables import missing_inputs
from thimble_zarr.analysis.compute.windows import Source
from thimble_zarr.analysis.result import CheckResult, ParameterResult, SubsetResult
from thimble_zarr.analysis.selection import select
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.errors import ThimbleError
from thimble_zarr.sources.open import open_recording


def check(
    store: str | Path,
    *,
    tokens: str | Sequence[int] | np.ndarray | None = None,
    steps: str | None = None,
    parameters: str | Sequence[str] = (),
    formula: bool = True,
    replay: bool = True,
    extended: bool = False,
    device: str | None = None,
    token_mask: Path | None = None,
    memory_bytes: int | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> CheckResult:
    """Check that every recorded row of a store follows from the row before.

    The formula predicts each change of the weights from the recorded states, and torch takes each
    step again and must get the recorded bits (`replay`). If it does not, the cause is looked for.
    All subsets are checked in one pass over the store.

    Parameters
    ----------
    store
        A store, or a safetensors file of the original notebook.
    tokens
        Which tokens: `all`, `live`, `dead`, ids, `@FILE` with ids, or `text:` and a token's text.
        Several subsets may be given, such as `dead,live,all`. None means `dead` where it is known
        which tokens are, else `all`.
    steps
        First and last step, such as `100:200`; all by default.
    parameters
        Names or patterns such as `*.weight`; all by default.
    formula, replay
        Whether to compare with the formula, and whether to take the steps again. Without what it
        needs the replay is left out.
    extended
        Whether to add the columns `audit.table.EXTENDED`.
    device
        Where to replay, as torch names it. By default where the run was recorded, if this machine
        has it, else the CPU.
    token_mask
        The token mask of a notebook's file.
    memory_bytes
        Bound on the memory of all processes together; by default a share of what is free.
    workers
        How many processes there may be; by default one for each CPU.
    scheduler
        Address of a Dask scheduler whose workers are to be used. Those of an active
        `distributed.Client` are used anyway, unless memory or workers are given.
    progress
        Called with how many parts of a parameter are done, and how many there are.

    Returns
    -------
    CheckResult

    Raises
    ------
    ThimbleError
        If the store, or its only parameter, cannot be read or checked, or options do not go
        together. Of several parameters, those that cannot be checked have an `error` instead.

    Examples
    --------
    >>> import thimble_zarr
    >>> result = thimble_zarr.check("run.zarr", tokens="dead")  # doctest: +SKIP
    >>> result.holds, result.verdict  # doctest: +SKIP
    (True, 'HOLDS to the bit: replayed, all 17,500 values each of W, exp_avg and exp_avg_sq ...')
    >>> result.table.head()  # doctest: +SKIP
    """
    if tokens is not None and not isinstance(tokens, str):
        tokens = ",".join(map(str, tokens))
    asked = _Asked(tokens, steps, formula=formula, replay=replay, extended=extended)
    resources = Resources(memory_bytes=memory_bytes, workers=workers, scheduler=scheduler)
    patterns = [parameters] if isinstance(parameters, str) else parameters
    readers = open_recording(store, parameters=patterns, token_mask=token_mask)
    results = []
    for reader in readers:
        name = getattr(reader, "group", None) or None
        subsets: tuple[SubsetResult, ...] = ()
        failed: Exception | None = None
        try:
            subsets = asked.answer(
                Path(store), name, Source.of(reader, device), resources, progress
            )
        except (ThimbleError, OSError) as error:
            if len(readers) == 1:
                raise
            failed = error
        results.append(ParameterResult(Path(store), name, subsets, failed))
    return CheckResult(Path(store), (*results,))


@dataclass(frozen=True)
class _Asked:
    """What `check` was asked of each parameter."""

    tokens: str | None
    steps: str | None
    _: KW_ONLY
    formula: bool
    replay: bool
    extended: bool

    def answer(
        self,
        store: Path,
        parameter: str | None,
        source: Source,
        resources: Resources,
        progress: Callable[[int, int], object] | None,
    ) -> tuple[SubsetResult, ...]:
        schema = source.reader.schema
        selected, subsets = select(source, self.tokens, self.steps)
        replay = self.replay
        if self.formula:  # else there is nothing to do without the replay, and an error says why
            replay = replay and not missing_inputs("unexplained", schema)
        audit = Audit.of(
            selected,
            formula=self.formula,
            replay=replay,
            extended=self.extended,
            subsets={name: subset.ids for name, subset in subsets.items()},
        )
        with computed(audit.reduction, resources, replay=replay, progress=progress) as numbers:
            checked = audit.reduction.selected
            altered = find_altered(checked, before_block=numbers.reach) if replay else ()
            tables = tabulated(audit, numbers.result())
        results, steps = [], selected.steps
        for table, (name, subset) in zip(tables, subsets.items(), strict=True):
            findings = find_causes(subset, table, altered) if replay else []
            result = SubsetResult(
                store=store,
                parameter=parameter,
                schema=schema,
                subset=name,
                n_tokens=len(subset.tokens),
                steps=(int(steps[0]), int(steps[-1])),
                n_recorded=int((steps > 0).sum()),
                extended=self.extended,
                numbers=table,
                findings=(*findings,),
                verdict=verdict(table, findings, source.reader),
            )
            results.append(result)
        return (*results,)
