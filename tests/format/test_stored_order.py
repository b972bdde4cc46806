"""Dead tokens lie after all others on disk, and nobody who asks by id can tell."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.support.faults import relabel
from tests.support.reads import Reads
from tests.support.runs import History, live_mask, record, token_labels
from thimble_zarr import accounting, open_dataset
from thimble_zarr.errors import ConfigError, DamagedStoreError
from thimble_zarr.format.schema import TokenLabels, packed_mask
from thimble_zarr.store.integrity.repair import plan_repair, repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.reader import StoreReader

N_TOKENS, N_LIVE, N_STEPS = 1999, 1500, 20


@pytest.fixture(scope="module")
def history(path: Path) -> History:
    options = {"memory_bytes": 32 * 2**20}
    sizes = {"n_steps": N_STEPS, "n_tokens": N_TOKENS, "n_dims": 11, "n_live": N_LIVE}
    return record(path, recorder_options=options, **sizes)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ordered") / "run.zarr"


@pytest.fixture(scope="module")
def ds(path: Path, history: History) -> xr.Dataset:
    return open_dataset(path)


def test_tokens_are_in_the_order_of_their_ids(ds: xr.Dataset, history: History) -> None:
    assert ds.token.values.tolist() == list(range(N_TOKENS))
    np.testing.assert_array_equal(ds.live, live_mask(N_TOKENS, N_LIVE))
    np.testing.assert_array_equal(ds.W, history["W"])
    np.testing.assert_array_equal(ds.W.isel(token=[7, 3, 1998]), history["W"][:, [7, 3, 1998]])
    np.testing.assert_array_equal(ds.W.isel(token=slice(900, 30, -3)), history["W"][:, 900:30:-3])
    np.testing.assert_array_equal(ds.W.sel(token=1234), history["W"][:, 1234])


def test_on_disk_the_dead_ones_come_last(path: Path, ds: xr.Dataset, history: History) -> None:
    plain = xr.open_zarr(path)
    assert plain.dead.values.tolist() == [False] * N_LIVE + [True] * (N_TOKENS - N_LIVE)
    same = plain.W.sel(token=ds.token).values
    np.testing.assert_array_equal((same.astype("u4") << 16).view("f4"), history["W"])
    np.testing.assert_array_equal(plain["count"].sel(token=ds.token), ds.n_occurrences)


@pytest.mark.parametrize("replay", [False, True])
def test_only_chunks_of_dead_tokens_are_read(
    ds: xr.Dataset, monkeypatch: pytest.MonkeyPatch, *, replay: bool
) -> None:
    schema = StoreReader.open(ds.W.data.variable.source.reader.path).schema
    first = N_LIVE // schema.layout.chunk_tokens
    n_chunks = -(-N_TOKENS // schema.layout.chunk_tokens)
    reads = Reads(monkeypatch)
    table = accounting(ds.sel(token=ds.dead), replay=replay)
    assert {chunk for _, chunk in reads.chunks} == set(range(first, n_chunks))
    assert len(reads.chunks) == len(set(reads.chunks))  # each once
    assert int(table.n_elements) == 11 * (N_TOKENS - N_LIVE)


def test_the_order_changes_no_number(tmp_path: Path, path: Path, ds: xr.Dataset) -> None:
    sizes = {"n_steps": N_STEPS, "n_tokens": N_TOKENS, "n_dims": 11, "n_live": N_LIVE}
    options = {"memory_bytes": 32 * 2**20, "labels": None}
    record(tmp_path / "run.zarr", recorder_options=options, **sizes)
    assert StoreReader.open(tmp_path / "run.zarr").schema.stored_last is None
    in_order = open_dataset(tmp_path / "run.zarr")
    xr.testing.assert_equal(
        ds.adam_residual.drop_vars(set(ds.coords) - set(in_order.coords)).load(),
        in_order.adam_residual.load(),
    )
    ids = ds.token.values[ds.dead.values]
    for tokens in (ids, np.arange(N_TOKENS), ids[::-1]):
        both = [accounting(of.sel(token=tokens)) for of in (ds, in_order)]
        xr.testing.assert_allclose(*both, rtol=1e-12)
        assert int(both[0].n_different.sum()) == 0


@pytest.mark.parametrize("live", [np.ones(11, bool), np.zeros(11, bool), None])
def test_where_all_are_alike_they_lie_in_order(tmp_path: Path, live: np.ndarray | None) -> None:
    labels = TokenLabels(live=live, dead=None if live is None else ~live, text=["a"] * 11)
    record(tmp_path / "run.zarr", n_steps=1, recorder_options={"labels": labels})
    assert StoreReader.open(tmp_path / "run.zarr").schema.stored_last is None
    assert xr.open_zarr(tmp_path / "run.zarr").token.values.tolist() == list(range(11))


def test_labels_that_do_not_fit_are_refused_as_ever(toy_path: Path) -> None:
    schema = StoreReader.open(toy_path).schema
    with pytest.raises(ConfigError, match="11 tokens, but 12 values"):
        schema.labelled(token_labels(12))


@pytest.mark.parametrize(
    "mask", ["", "00", "zz00", "0001", "000000", "    ", "f0  ", 7, "0" * 10**6]
)
def test_what_is_no_mask_is_damage(toy_path: Path, tmp_path: Path, mask: object) -> None:
    relabel(toy_path, tmp_path / "run.zarr", stored_last=mask)
    with pytest.raises(DamagedStoreError, match=r"stored.last"):
        StoreReader.open(tmp_path / "run.zarr")


def test_another_order_than_the_labels_is_damage(toy_path: Path, tmp_path: Path) -> None:
    """Else every token would silently be another."""
    other = packed_mask(token_labels(n_live=5).dead)
    relabel(toy_path, tmp_path / "run.zarr", stored_last=other)
    with pytest.raises(DamagedStoreError, match="do not ascend"):
        open_dataset(tmp_path / "run.zarr")


def test_ids_that_are_lost_are_counted_anew(toy_path: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(toy_path, tmp_path / "run.zarr"))
    before = xr.open_zarr(store).token.values
    (store / "token" / "c.0").unlink()
    with pytest.raises(DamagedStoreError):
        open_dataset(store)
    assert any("again: its values are known" in step for step in repair(store).steps)
    assert not verify(store).findings
    np.testing.assert_array_equal(xr.open_zarr(store).token, before)
    assert open_dataset(store).equals(open_dataset(toy_path))


def test_ids_whose_order_is_lost_are_not_counted(toy_path: Path, tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    relabel(toy_path, store, stored_last="no mask")
    (store / "token" / "c.0").unlink()
    ledger = store / ".thimble" / "blocks.jsonl"  # whose first line has a copy of the metadata
    ledger.write_bytes(ledger.read_bytes().replace(b'"metadata"', b'"nothing "', 1))
    plan = plan_repair(store)
    assert any(
        "which tokens were recorded, or in which order" in reason for reason in plan.hopeless
    )


def test_the_order_is_told_in_the_metadata(path: Path, history: History) -> None:
    known = json.loads((path / "zarr.json").read_text())["attributes"]["thimble"]
    packed = np.frombuffer(bytes.fromhex(known["stored_last"]), np.uint8)
    dead = np.unpackbits(packed, count=N_TOKENS).astype(bool)
    np.testing.assert_array_equal(dead, ~live_mask(N_TOKENS, N_LIVE))
