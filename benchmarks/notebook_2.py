"""The second notebook, cell by cell, on the file the first one would have saved.

Names and order of operations are the notebook's; printing is left out but for the tables.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file


def main(thimble_path: Path, mask_path: Path, output_path: Path) -> None:
    """Load everything, compare predicted and observed changes of the dead tokens, save a CSV."""
    data = load_file(str(thimble_path))
    W = data["W"]
    momentum_W = data["momentum_W"]
    variance_W = data["variance_W"]
    learning_rate = data["learning_rate"].item()
    weight_decay = data["weight_decay"].item()
    beta1 = data["adam_beta1"].item()
    beta2 = data["adam_beta2"].item()
    epsilon = data["adam_epsilon"].item()
    num_steps = int(data["num_steps"].item())

    dead_mask = load_file(str(mask_path))["dead_mask"].bool()

    observed_dW = W[1:] - W[:-1]
    observed_dW_dead = observed_dW[:, dead_mask, :]

    momentum_dead = momentum_W[1:, dead_mask, :]
    variance_dead = variance_W[1:, dead_mask, :]
    W_prev_dead = W[:-1, dead_mask, :]
    timesteps = torch.arange(1, num_steps + 1, dtype=torch.float32)
    bias_correction1 = (1 - beta1**timesteps).view(-1, 1, 1)
    bias_correction2 = (1 - beta2**timesteps).view(-1, 1, 1)
    m_hat = momentum_dead / bias_correction1
    v_hat = variance_dead / bias_correction2
    adam_term = learning_rate * m_hat / (torch.sqrt(v_hat) + epsilon)
    decay_term = weight_decay * W_prev_dead.float()
    predicted_dW_dead = -adam_term - decay_term

    pred_flat = predicted_dW_dead.reshape(num_steps, -1)
    obs_flat = observed_dW_dead.float().reshape(num_steps, -1)
    norm_predicted = torch.norm(pred_flat, dim=1)
    norm_observed = torch.norm(obs_flat, dim=1)
    norm_difference = torch.norm(pred_flat - obs_flat, dim=1)
    cosine_sim = torch.sum(pred_flat * obs_flat, dim=1) / (norm_predicted * norm_observed + 1e-10)
    ratio = norm_predicted / (norm_observed + 1e-10)
    results = pd.DataFrame(
        {
            "t": range(1, num_steps + 1),
            "norm_predicted": norm_predicted.numpy(),
            "norm_observed": norm_observed.numpy(),
            "norm_difference": norm_difference.numpy(),
            "cosine_similarity": cosine_sim.numpy(),
            "ratio": ratio.numpy(),
        }
    )
    print(results.head(20).to_string(index=False))
    print(results.tail(20).to_string(index=False))
    print(results.describe())
    results.to_csv(output_path, index=False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
