"""A recorded run as panels read it: its dataset, and its summary."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from thimble_zarr.analysis.dataset.lattice import lattice


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
    n_points
        Tokens of a group at most that a figure shows as points.
    """

    store: str
    ds: xr.Dataset
    summary: xr.Dataset
    n_columns: int = 400
    n_rows: int = 300
    n_points: int = 1000

    @property
    def groups(self) -> list[str]:
        """The groups of tokens that it was summed up for."""
        return [str(name) for name in self.summary.group.values]

    @property
    def members(self) -> dict[str, np.ndarray]:
        """Which tokens are in each group, masks of shape `(token,)`."""
        masks = self.summary["is_member"].transpose("group", "token").values.astype(bool)
        return dict(zip(self.groups, masks, strict=True))

    @property
    def ids(self) -> np.ndarray:
        """The id of each token, int64, shape `(token,)`."""
        n_tokens, coords = self.summary.sizes["token"], self.summary.coords
        ids: np.ndarray = coords["token"].values if "token" in coords else np.arange(n_tokens)
        return ids

    @property
    def steps(self) -> np.ndarray:
        """The steps that it was summed up for, int64."""
        steps: np.ndarray = self.summary.step.values.astype(np.int64)
        return steps

    @property
    def follows(self) -> np.ndarray:
        """Whether the step before each was recorded too, so that the change is known."""
        return np.append(False, np.diff(self.steps) == 1)

    @property
    def row_name(self) -> str:
        """What a row of the parameter is called."""
        dims = self.ds["W"].dims
        return "token" if "token" in dims else "row" if len(dims) > 2 else "element"

    @property
    def ulp(self) -> xr.DataArray:
        """The ULP of each weight, of the dtype that the summary measures in."""
        dtype = self.summary.attrs["ulp_dtype"]
        ds = self.ds if dtype == self.ds.attrs["dtype"] else lattice(self.ds, dtype)
        return ds["ulp"]

    def of_groups(self, name: str) -> np.ndarray:
        """Return a variable of the summary, of groups and steps alone, as `(group, step)`."""
        values: np.ndarray = self.summary[name].transpose("group", "step").values
        return values.astype(np.float64)

    def medians(self, name: str) -> np.ndarray:
        """Return the median of a variable over the tokens of each group, as `(group, step)`."""
        quantiles = self.summary[f"{name}_quantiles"].sel(quantile=0.5)
        values: np.ndarray = quantiles.transpose("group", "step").values
        return values.astype(np.float64)

    def code(self, panel: str) -> str:
        """Return the line of Python that draws a panel of it."""
        return f"thimble_zarr.plot.{panel}({self.store!r})"
