"""Ours: the command line for the checks, the dataset for the rest."""

import json
import sys

import numpy as np

from benchmarks.peers.by_hand import Answer, Task
from benchmarks.peers.inputs import BOTH, EXACT, SMALL, TABLES, VARIABLES, Inputs
from thimble_zarr import open_dataset

CHECKS = {
    TABLES[0]: ("--tokens", "dead", "--no-replay", "--format", "csv"),
    TABLES[1]: ("--tokens", "all", "--no-replay", "--format", "csv"),
    EXACT: ("--tokens", "all", "--no-formula", "--format", "json"),
    BOTH: ("--tokens", "all", "--format", "json"),
}


def check(task: str, inputs: Inputs) -> list[str]:
    """Return the command that checks."""
    command = (sys.executable, "-m", "thimble_zarr", "check", str(inputs.store), "--quiet")
    return [*command, *CHECKS[task]]


def counts(stdout: str) -> list[float]:
    """Return how many elements differ, as `check --format json` printed it."""
    replay = json.loads(stdout)["replay"]
    return [float(found["total"] - found["equal"]) for found in replay.values()]


def history(inputs: Inputs) -> Answer:
    ds = open_dataset(inputs.store)[list(VARIABLES)].sel(token=inputs.token).compute()
    return np.stack([ds[name].values for name in VARIABLES])


def residual(inputs: Inputs) -> Answer:
    values: Answer = open_dataset(inputs.store).sel(token=inputs.random).adam_residual.values
    return values


def row(inputs: Inputs) -> Answer:
    ds = open_dataset(inputs.store)[list(VARIABLES)].sel(step=inputs.row).compute()
    return np.stack([ds[name].values for name in VARIABLES])


READING: dict[str, Task] = {SMALL[0]: history, SMALL[1]: residual, SMALL[2]: row}

if __name__ == "__main__":
    from benchmarks.peers.child import main

    main(READING)
