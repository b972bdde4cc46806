"""`demo`, on the default corpus."""

from pathlib import Path

import pytest
from click.testing import Result
from filelock import FileLock

from tests.support.commands import info_of, run, succeeds, told
from thimble_zarr import open_dataset


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Path, Result]:
    """One step of the demo, with the real default corpus: its store, our cache, what it said."""
    store = tmp_path_factory.mktemp("demo") / "demo.zarr"
    with FileLock(cache.with_suffix(".lock")):
        return store, cache / "thimble-zarr", run("demo", store, "--steps", 1)


def test_the_demo_trains_records_and_checks(demo: tuple[Path, Path, Result]) -> None:
    store, _, result = demo
    assert result.exit_code == 0
    assert told(result.stderr) == []
    for part in (
        "1 steps of 10,000 x 64",
        "t=   1: ratio=1.0",
        "HOLDS to the bit: ",
        "open_dataset(",
    ):
        assert part in result.stdout, part
    content = info_of(store)
    assert (content["n_rows"], content["shape"]) == (2, [10_000, 64])
    assert content["attrs"]["config"]["batch_size"] == 16
    assert content["attrs"]["corpus"]["n_tokens"] > 100_000
    page = store.with_suffix(".html")
    assert f"Look next, in a browser: {page}\n" in result.stdout
    assert "</html>" in page.read_text(encoding="utf-8")
    code = result.stdout.partition("\nin Python:\n")[2]
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in code.splitlines()), names)
    assert names["ds"]["token"].size == 10_000


def test_the_default_tokenizer_leaves_dead_tokens(demo: tuple[Path, Path, Result]) -> None:
    ds = open_dataset(demo[0])
    assert 500 < int(ds.dead.sum()) < 5000
    assert ds.dead.values.tolist() == (ds.n_occurrences.values == 0).tolist()
    assert int(ds.n_occurrences.sum()) == info_of(demo[0])["attrs"]["corpus"]["n_tokens"]


def test_tokens_without_a_corpus_counts_the_default_one(demo: tuple[Path, Path, Result]) -> None:
    store, cache, _ = demo
    files = [file for file in cache.rglob("*") if file.is_file() and "summaries" not in file.parts]
    kept = {file: file.stat().st_mtime_ns for file in files}
    assert len(kept) == 2  # corpus and tokenizer
    stdout = succeeds("tokens").stdout
    ds = open_dataset(store)
    n_dead = int(ds.dead.sum())
    assert f"10,000: {10_000 - n_dead:,} live, {n_dead:,} dead" in stdout
    assert f"{info_of(store)['attrs']['corpus']['n_tokens']:,} tokens" in stdout
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
