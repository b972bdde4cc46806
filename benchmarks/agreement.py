"""Compare `check` with an independent computation: TensorStore, NumPy, float64, row by row."""

import json
from pathlib import Path

import click
import numpy as np
import tensorstore

from thimble_zarr import accounting, open_dataset
from thimble_zarr.analysis.audit.table import COLUMNS

N_RANDOM = 37


def independent(store: Path, token: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns for some tokens, from the bits, with the default hyper-parameters."""

    def read(name: str) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / name)}}
        return np.asarray(tensorstore.open(spec, read=True).result().read().result())

    def values(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    places = np.argsort(read("token"))[token]  # where the tokens of these ids lie
    W, exp_avg, exp_avg_sq = (read(name)[:, places] for name in ("W", "exp_avg", "exp_avg_sq"))
    rows = []
    for t in range(1, len(W)):
        m_hat = values(exp_avg[t]) / (1 - 0.9**t)
        v_hat = values(exp_avg_sq[t]) / (1 - 0.999**t)
        predicted = -1e-3 * m_hat / (np.sqrt(v_hat) + 1e-8)
        observed = values(W[t]) - values(W[t - 1])
        norms = [np.linalg.norm(change) for change in (predicted, observed, predicted - observed)]
        cosine = (predicted * observed).sum() / norms[0] / norms[1]
        rows.append([*norms, cosine, norms[0] / norms[1]])
    return dict(zip(COLUMNS, np.array(rows).T, strict=True))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest relative difference; where nothing moved both are no finite number."""
    finite = np.isfinite(ours) & (theirs != 0)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    return float(np.abs(ours[finite] / theirs[finite] - 1).max())


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
def main(store: Path) -> None:
    """Print the largest relative difference of any column at any step, by subset, as JSON."""
    ds = open_dataset(store)
    all_ids = ds.token.values
    subsets = {
        "dead": all_ids[ds.dead.values],
        "live": all_ids[ds.live.values],
        "all": all_ids,
        f"{N_RANDOM} random": np.sort(np.random.default_rng(0).permutation(all_ids)[:N_RANDOM]),
    }
    worst = {}
    for name, token in subsets.items():
        table, expected = accounting(ds.sel(token=token), replay=False), independent(store, token)
        worst[name] = max(difference(table[of].values, expected[of]) for of in COLUMNS)
        click.echo(f"  {name}: {worst[name]:.1e}", err=True)
    click.echo(json.dumps(worst))


if __name__ == "__main__":
    main()
