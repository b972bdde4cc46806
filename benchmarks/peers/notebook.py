"""The notebook's way: its one file, loaded whole, and torch."""

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import notebook_2
from benchmarks.peers.by_hand import Answer, Task
from benchmarks.peers.inputs import TABLES, TASKS, Inputs, columns
from benchmarks.peers.pages import touched_bytes
from benchmarks.peers.replay import Replay

NAMES = ("W", "grad_W", "momentum_W", "variance_W")
ITEMSIZES = {"W": 2, "grad": 2, "exp_avg": 4, "exp_avg_sq": 4}
ONLY_W = {"W": 2, "grad": 0, "exp_avg": 0, "exp_avg_sq": 0}


def formula_dead(inputs: Inputs) -> Answer:
    """Run the second notebook itself."""
    table_file = inputs.directory / "notebook.csv"
    notebook_2.main(inputs.notebook_file, inputs.mask_file, table_file)
    return pd.read_csv(table_file).drop(columns="t").to_numpy()


def formula_all(inputs: Inputs) -> Answer:
    """Go step by step: the notebook's arrays of all tokens would not fit."""
    data = load_file(inputs.notebook_file)
    sums = []
    for t in range(1, len(data["W"])):
        predicted = predict(data, t, data["momentum_W"][t], data["variance_W"][t], data["W"][t - 1])
        observed = data["W"][t].float() - data["W"][t - 1].float()
        difference = predicted - observed
        pairs = (
            (predicted, predicted),
            (observed, observed),
            (difference, difference),
            (predicted, observed),
        )
        sums.append([float(torch.sum(left * right)) for left, right in pairs])
    return columns(torch.tensor(sums, dtype=torch.float64).numpy())


def predict(
    data: dict[str, Tensor], t: Tensor | int, m: Tensor, v: Tensor, previous: Tensor
) -> Tensor:
    """Return the change that the formula predicts (with the learning rate on the decay)."""
    m_hat = m / (1 - data["adam_beta1"].double() ** t).float()
    v_hat = v / (1 - data["adam_beta2"].double() ** t).float()
    adam_term = data["learning_rate"] * m_hat / (torch.sqrt(v_hat) + data["adam_epsilon"])
    decay_term = data["learning_rate"] * data["weight_decay"] * previous.float()
    return -adam_term - decay_term


def exact(inputs: Inputs) -> Answer:
    data = load_file(inputs.notebook_file)
    replay = Replay(inputs)
    for W, grad, m, v in zip(*(data[name] for name in NAMES), strict=True):
        replay.compare(W, m.bfloat16(), v.bfloat16(), grad)
    return replay.n_different


def history(inputs: Inputs) -> Answer:
    data = load_file(inputs.notebook_file)
    return torch.stack([data[name][:, inputs.token].float() for name in NAMES]).numpy()


def residual(inputs: Inputs) -> Answer:
    data = load_file(inputs.notebook_file)
    W, _, m, v = (data[name][:, torch.from_numpy(inputs.random)].float() for name in NAMES)
    left = torch.full_like(W, torch.nan)
    t = torch.arange(1, len(W)).view(-1, 1, 1)
    left[1:] = W[1:] - W[:-1] - predict(data, t, m[1:], v[1:], W[:-1])
    return left.numpy()


def row(inputs: Inputs) -> Answer:
    data = load_file(inputs.notebook_file)
    return torch.stack([data[name][inputs.row].float() for name in NAMES]).numpy()


SOLVED = (formula_dead, formula_all, exact, history, residual, row)
READING: dict[str, Task] = dict(zip(TASKS, SOLVED, strict=True))


def mapped_bytes(task: str, inputs: Inputs) -> int:
    """Return the bytes of the pages that a task touches: `load_file` maps the file.

    The second notebook subtracts all weights before it looks at the dead ones.
    """
    n_bytes = touched_bytes(task, inputs, ITEMSIZES)
    if task == TABLES[0]:
        n_bytes += touched_bytes(TABLES[1], inputs, ONLY_W) - touched_bytes(task, inputs, ONLY_W)
    return n_bytes


if __name__ == "__main__":
    from benchmarks.peers.child import main

    main(READING, mapped_bytes)
