"""A recorded run as panels read it: its dataset, and its summary."""

from dataclasses import dataclass

import xarray as xr


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recorded run.

    Attributes
    ----------
    store
        Its path, as the reader wrote it.
    ds
        What `open_dataset` returns, for single rows and tokens.
    summary
        What `summary` returns, for everything else; lazy.
    n_columns
        Points of a line and columns of a picture at most: each stands for some consecutive steps.
    n_rows
        Rows of a picture at most: each stands for some tokens.
    """

    store: str
    ds: xr.Dataset
    summary: xr.Dataset
    n_columns: int = 400
    n_rows: int = 300

    @property
    def groups(self) -> list[str]:
        """The groups of tokens that it was summed up for."""
        return [str(name) for name in self.summary.group.values]

    def code(self, panel: str) -> str:
        """Return the line of Python that draws a panel of it."""
        return f"thimble_zarr.plot.{panel}({self.store!r})"
