"""Independent re-computations of the accounting, written from the notebooks and nothing else."""

import numpy as np
import torch
import xarray as xr

COLUMNS = ("norm_predicted", "norm_observed", "norm_difference", "cosine_similarity", "ratio")


def in_float64(
    W: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> dict[str, np.ndarray]:
    """Return the columns from arrays of all rows, shape (step, token, dim), all in float64."""
    t = np.arange(1, len(W), dtype=np.float64).reshape(-1, 1, 1)
    m_hat = exp_avg[1:].astype(np.float64) / (1 - betas[0] ** t)
    v_hat = exp_avg_sq[1:].astype(np.float64) / (1 - betas[1] ** t)
    W = W.astype(np.float64)
    predicted = -lr * m_hat / (np.sqrt(v_hat) + eps) - lr * weight_decay * W[:-1]
    observed = W[1:] - W[:-1]
    predicted, observed = predicted.reshape(len(t), -1), observed.reshape(len(t), -1)
    norm_predicted = np.linalg.norm(predicted, axis=1)
    norm_observed = np.linalg.norm(observed, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "norm_predicted": norm_predicted,
            "norm_observed": norm_observed,
            "norm_difference": np.linalg.norm(predicted - observed, axis=1),
            "cosine_similarity": (predicted * observed).sum(1) / norm_predicted / norm_observed,
            "ratio": norm_predicted / norm_observed,
        }


def notebook_2(
    W: torch.Tensor,
    momentum_W: torch.Tensor,
    variance_W: torch.Tensor,
    mask: torch.Tensor,
    *,
    lr: float = 1e-3,
) -> dict[str, np.ndarray]:
    """Return the columns as the second notebook computes them, in its own dtypes and order."""
    observed_dW_dead = (W[1:] - W[:-1])[:, mask, :]
    n_steps = len(observed_dW_dead)
    momentum_dead, variance_dead = momentum_W[1:, mask, :], variance_W[1:, mask, :]
    timesteps = torch.arange(1, n_steps + 1, dtype=torch.float32)
    bias_correction1 = (1 - 0.9**timesteps).view(-1, 1, 1)
    bias_correction2 = (1 - 0.999**timesteps).view(-1, 1, 1)
    m_hat, v_hat = momentum_dead / bias_correction1, variance_dead / bias_correction2
    predicted_dW_dead = -(lr * m_hat / (torch.sqrt(v_hat) + 1e-8))
    pred_flat = predicted_dW_dead.reshape(n_steps, -1)
    obs_flat = observed_dW_dead.float().reshape(n_steps, -1)
    norm_predicted = torch.norm(pred_flat, dim=1)
    norm_observed = torch.norm(obs_flat, dim=1)
    cosine = torch.sum(pred_flat * obs_flat, dim=1) / (norm_predicted * norm_observed + 1e-10)
    return {
        "norm_predicted": norm_predicted.numpy(),
        "norm_observed": norm_observed.numpy(),
        "norm_difference": torch.norm(pred_flat - obs_flat, dim=1).numpy(),
        "cosine_similarity": cosine.numpy(),
        "ratio": (norm_predicted / (norm_observed + 1e-10)).numpy(),
    }


def assert_same_table(
    table: xr.Dataset, expected: dict[str, np.ndarray], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Compare to within ten roundings of an element, which are float32's for 16-bit weights."""
    error = 10 * 2.0 ** (-24 if dtype.itemsize == 2 else -53)
    size = {name: np.abs(expected[name]) for name in COLUMNS}
    # The difference inherits what predicted and observed change have.
    size["norm_difference"] = expected["norm_predicted"] + expected["norm_observed"]
    size["cosine_similarity"] = np.ones(1)
    for name in COLUMNS:
        found = table[name].values
        with np.errstate(invalid="ignore"):
            apart = np.abs(found - expected[name])
        same = (apart <= error * size[name]) | (np.isnan(found) & np.isnan(expected[name]))
        same |= found == expected[name]  # infinite
        assert same.all(), (name, found, expected[name])
