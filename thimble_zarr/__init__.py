"""thimble-zarr: a flight recorder and auditor for neural-network training.

Record what the optimizer saw and did at every step, then ask whether it explains what happened::

    with Recorder("run.zarr", optimizer, parameter=embedding.weight) as recorder:
        ...                                       # your training loop, unchanged
    result = check("run.zarr", tokens="dead")     # does every row follow from the row before?
    print(result.holds, result.table.head())
    ds = open_dataset("run.zarr")                 # lazy, xarray and Dask

Names are loaded when they are first used, so that importing the package stays cheap.
"""

TYPE_CHECKING = False  # as type checkers know it; importing typing takes 10 ms

if TYPE_CHECKING:
    from thimble_zarr.analysis.audit.accounting import accounting
    from thimble_zarr.analysis.check import check
    from thimble_zarr.analysis.dataset.lattice import lattice
    from thimble_zarr.analysis.dataset.open import open_dataset, open_datatree
    from thimble_zarr.analysis.dataset.runs import open_datasets
    from thimble_zarr.analysis.diff.diff import diff
    from thimble_zarr.analysis.summary.summary import summary
    from thimble_zarr.errors import ThimbleError
    from thimble_zarr.format.schema import TokenLabels
    from thimble_zarr.optim.registry import register_optimizer
    from thimble_zarr.record.recorder import Recorder
    from thimble_zarr.record.schedule import every, log_spaced, windows
    from thimble_zarr.report import plot
    from thimble_zarr.report.html import write_report
    from thimble_zarr.sources.recode import recode
    from thimble_zarr.store.integrity.verify import verify
    from thimble_zarr.store.remote.publish import fetch, publish

__version__ = "0.1.0"

__all__ = [
    "Recorder",
    "ThimbleError",
    "TokenLabels",
    "accounting",
    "check",
    "diff",
    "every",
    "fetch",
    "lattice",
    "log_spaced",
    "open_dataset",
    "open_datasets",
    "open_datatree",
    "plot",
    "publish",
    "recode",
    "register_optimizer",
    "summary",
    "verify",
    "windows",
    "write_report",
]

_HOMES = {
    "Recorder": "thimble_zarr.record.recorder",
    "ThimbleError": "thimble_zarr.errors",
    "TokenLabels": "thimble_zarr.format.schema",
    "accounting": "thimble_zarr.analysis.audit.accounting",
    "check": "thimble_zarr.analysis.check",
    "diff": "thimble_zarr.analysis.diff.diff",
    "fetch": "thimble_zarr.store.remote.publish",
    "publish": "thimble_zarr.store.remote.publish",
    "every": "thimble_zarr.record.schedule",
    "lattice": "thimble_zarr.analysis.dataset.lattice",
    "log_spaced": "thimble_zarr.record.schedule",
    "open_dataset": "thimble_zarr.analysis.dataset.open",
    "open_datasets": "thimble_zarr.analysis.dataset.runs",
    "open_datatree": "thimble_zarr.analysis.dataset.open",
    "plot": "thimble_zarr.report.plot",
    "recode": "thimble_zarr.sources.recode",
    "register_optimizer": "thimble_zarr.optim.registry",
    "summary": "thimble_zarr.analysis.summary.summary",
    "verify": "thimble_zarr.store.integrity.verify",
    "windows": "thimble_zarr.record.schedule",
    "write_report": "thimble_zarr.report.html",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        import importlib

        home = importlib.import_module(_HOMES[name])
        return home if name == "plot" else getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
