"""Run one task of one peer in this process, and print what it gave and took."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.peers.by_hand import Task
from benchmarks.peers.inputs import EXACT, TABLES, Inputs
from benchmarks.processes import bytes_read

HEADER = "t,norm_predicted,norm_observed,norm_difference,cosine_similarity,ratio"


def nothing_mapped(task: str, inputs: Inputs) -> int:
    """Say that a peer reads by calls, which the kernel counts."""
    return 0


def main(
    reading: Mapping[str, Task], mapped_bytes: Callable[[str, Inputs], int] = nothing_mapped
) -> None:
    """Take task, directory and store from the command line; print a table or digest, then JSON."""
    task, directory, store = sys.argv[1:]
    inputs = Inputs(Path(directory), Path(store))
    before, start_s = bytes_read(), time.perf_counter()
    answer = reading[task](inputs)
    process_s, n_read = time.perf_counter() - start_s, bytes_read() - before
    if task in TABLES:
        print_table(answer)
    mapped = mapped_bytes(task, inputs)
    print(
        json.dumps(
            {
                "process_s": process_s,
                "process_bytes_read": n_read + mapped,
                "mapped_bytes": mapped,
                "digest": digest(task, answer),
            }
        )
    )


def print_table(table: np.ndarray) -> None:
    """Print every step, as CSV."""
    t = np.arange(1, len(table) + 1)
    np.savetxt(
        sys.stdout,
        np.column_stack([t, table]),
        fmt=["%d", *["%.9g"] * 5],
        delimiter=",",
        header=HEADER,
        comments="",
    )


def printed_table(stdout: str) -> np.ndarray:
    """Read what `print_table`, or `check --format csv`, printed; NaN where nothing is."""
    lines = iter(stdout.splitlines())
    for line in lines:
        if line == HEADER:
            break
    rows = [line.split(",")[1:] for line in lines if not line.startswith("{")]
    return np.array([[cell or "nan" for cell in row] for row in rows], np.float64)


def digest(task: str, answer: np.ndarray) -> list[float]:
    """Return a few numbers that tell answers apart: counts, or sums of sizes by variable."""
    if task in TABLES:
        return []
    if task == EXACT:
        return [float(count) for count in answer]
    sizes = np.abs(answer[:, 1:] if answer.ndim == 3 and task == "history" else answer)
    parts = sizes.reshape(len(sizes), -1) if task != "residual" else sizes.reshape(1, -1)
    return [float(np.nansum(part, dtype=np.float64)) for part in parts]
