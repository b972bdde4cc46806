"""A summary computed in the plainest way, float64 and whole arrays: what `summary` must equal.

Written from the definitions alone. It holds the run in memory, step by step.
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def spacing_of(values: np.ndarray, native: str) -> np.ndarray:
    """Return the distance to the next number away from zero, from the exponent alone."""
    digits, least = {"bfloat16": (8, -126), "float16": (11, -14), "float32": (24, -126)}[native]
    exponent = np.frexp(np.abs(values.astype(np.float64)))[1] - 1
    exponent = np.where(values == 0, least, np.maximum(exponent, least))
    return np.ldexp(1.0, exponent - (digits - 1))


def reference_summary(
    ds: xr.Dataset, native: str, groups: Mapping[str, np.ndarray], estimates: bool = True
) -> xr.Dataset:
    """Return the summary of an AdamW run of `open_dataset`; `groups` are masks over its tokens."""
    steps = ds.step.values
    n_steps, n_tokens, n_dims = ds.W.shape
    nan = np.full((n_steps, n_tokens), np.nan)
    per_token = {
        name: nan.copy()
        for name in (
            *("norm_W", "norm_delta_W", "l1_ulp", "l2_ulp", "max_ulp", "n_moved", "norm_grad"),
            *("norm_m_hat", "norm_sqrt_v_hat", "norm_residual"),
        )
    }
    of_group = {
        name: np.full((len(groups), n_steps, n_tokens), np.nan)
        for name in ("cosine_to_mean", "centroid_distance")
    }
    of_dim = {
        name: np.full((len(groups), n_steps, n_dims), np.nan)
        for name in ("centroid", "mean_delta_W", "mean_grad")
    }
    of_step = {
        name: np.full((len(groups), n_steps), np.nan)
        for name in (
            *("n_identical", "largest_identical", "norm_predicted", "norm_observed"),
            *("cosine_predicted", "share_moved", "share_stalled", "share_below_half_ulp"),
        )
    }
    previous = None
    for row, step in enumerate(steps.tolist()):
        at = ds.isel(step=row)
        W, grad, first, second = (
            at[name].values.astype(np.float64) for name in ("W", "grad", "exp_avg", "exp_avg_sq")
        )
        lr, beta1, beta2, eps, weight_decay, count = (
            float(at[name])
            for name in (
                *("learning_rate", "beta1", "beta2", "eps", "weight_decay", "optimizer_step"),
            )
        )
        per_token["norm_W"][row] = np.sqrt((W**2).sum(1))
        per_token["norm_grad"][row] = np.sqrt((grad**2).sum(1))
        if count > 0:
            m_hat, v_hat = first / (1 - beta1**count), second / (1 - beta2**count)
            per_token["norm_m_hat"][row] = np.sqrt((m_hat**2).sum(1))
            per_token["norm_sqrt_v_hat"][row] = np.sqrt(v_hat.sum(1))
        follows = previous is not None and steps[row - 1] == step - 1
        if follows:
            delta = W - previous
            ulps = delta / spacing_of(previous, native)
            predicted = -lr * m_hat / (np.sqrt(v_hat) + eps) - lr * weight_decay * previous
            per_token["norm_delta_W"][row] = np.sqrt((delta**2).sum(1))
            per_token["l1_ulp"][row] = np.abs(ulps).sum(1)
            per_token["l2_ulp"][row] = np.sqrt((ulps**2).sum(1))
            per_token["max_ulp"][row] = np.abs(ulps).max(1)
            per_token["n_moved"][row] = (np.abs(delta) > 0).sum(1)  # NaN is not known to have
            per_token["norm_residual"][row] = np.sqrt(((delta - predicted) ** 2).sum(1))
        for group, mask in enumerate(groups.values()):
            centroid = W[mask].mean(0)
            of_dim["centroid"][group, row] = centroid
            of_dim["mean_grad"][group, row] = grad[mask].mean(0)
            distance = np.sqrt(((W[mask] - centroid) ** 2).sum(1))
            of_group["centroid_distance"][group, row, mask] = distance
            sizes = np.unique(W[mask], axis=0, return_counts=True)[1]  # no -0.0 in what is tested
            of_step["n_identical"][group, row] = sizes[sizes > 1].sum()
            of_step["largest_identical"][group, row] = sizes.max()
            if follows:
                mean = delta[mask].mean(0)
                of_dim["mean_delta_W"][group, row] = mean
                with np.errstate(invalid="ignore", divide="ignore"):
                    cosine = (delta[mask] @ mean) / (
                        np.sqrt((delta[mask] ** 2).sum(1)) * np.sqrt((mean**2).sum())
                    )
                of_group["cosine_to_mean"][group, row, mask] = cosine
                want, seen = predicted[mask].ravel(), delta[mask].ravel()
                sizes_of_both = np.sqrt((want**2).sum()), np.sqrt((seen**2).sum())
                of_step["norm_predicted"][group, row] = sizes_of_both[0]
                of_step["norm_observed"][group, row] = sizes_of_both[1]
                with np.errstate(invalid="ignore", divide="ignore"):
                    of_step["cosine_predicted"][group, row] = (
                        (want * seen).sum() / sizes_of_both[0] / sizes_of_both[1]
                    )
                half = spacing_of(previous[mask], native).ravel() / 2
                of_step["share_moved"][group, row] = (np.abs(seen) > 0).mean()
                of_step["share_stalled"][group, row] = ((want != 0) & (seen == 0)).mean()
                of_step["share_below_half_ulp"][group, row] = (np.abs(want) < half).mean()
        previous = W
    tokens = {}
    with np.errstate(invalid="ignore"):
        conditions = {
            "freeze_step": per_token["l1_ulp"] > 0,
            "last_early": per_token["l2_ulp"] > np.sqrt(n_dims),
            "last_midlife": per_token["max_ulp"] > 1,
            "last_late": (per_token["max_ulp"] <= 1) & (per_token["l1_ulp"] > 0),
        }
    for name, holds in conditions.items():
        tokens[name] = ("token", (holds * steps[:, np.newaxis]).max(0))
    quantiles = {}
    for name, values in (per_token | of_group).items():
        found = np.full((len(groups), n_steps, len(QUANTILES)), np.nan)
        for group, mask in enumerate(groups.values()):
            of = (values if values.ndim == 2 else values[group])[:, mask]
            there = ~np.isnan(of).all(1)
            if there.any():
                found[group, there] = np.nanquantile(of[there], QUANTILES, axis=1).T
        quantiles[f"{name}_quantiles"] = (("group", "step", "quantile"), found)
    arrays = {
        **{name: (("step", "token"), values) for name, values in per_token.items()},
        **{name: (("group", "step", "token"), values) for name, values in of_group.items()},
        **{name: (("group", "step", "dim"), values) for name, values in of_dim.items()},
        **{name: (("group", "step"), values) for name, values in of_step.items()},
        **quantiles,
        **tokens,
        "is_member": (("group", "token"), np.stack([*groups.values()])),
    }
    coords = {"group": [*groups], "quantile": [*QUANTILES], "step": steps}
    for name in ("token", "text", "n_occurrences", "live", "dead"):
        if name in ds.coords:
            coords[name] = ds[name]
    return xr.Dataset(arrays, coords=coords, attrs={"ulp_dtype": native})


def assert_same_summary(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Compare numbers to 1e-6, counts and steps exactly."""
    assert {*found.data_vars} == {*expected.data_vars}
    for name, reference in expected.data_vars.items():
        assert found[name].dims == reference.dims
        tolerance = 0 if reference.dtype.kind in "biu" or name.startswith("n_") else 1e-6
        np.testing.assert_allclose(
            found[name].values.astype(float),
            reference.values.astype(float),
            rtol=tolerance,
            atol=1e-6 if name.startswith("cosine") else 0,
            err_msg=name,
        )
    for name in expected.coords:
        np.testing.assert_array_equal(found[name], expected[name])
