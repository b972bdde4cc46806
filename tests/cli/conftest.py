"""What tests of several commands need: a text, a tokenizer, a short run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.commands import N_VOCABULARY, succeeds
from thimble_zarr.experiment.vocabulary import train_tokenizer

TEXT = (
    "The step that the weights take is the step that the optimizer took.\n"
    "What the gradient says, the moments remember; what they remember moves the weights.\n"
    "A token that never occurs moves too, because the weights of input and output are one.\n"
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "corpus.txt"
    file.write_text(TEXT * 3, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Path:
    file = corpus.with_name("tokenizer.json")
    train_tokenizer([TEXT], N_VOCABULARY).save(str(file))
    return file


@pytest.fixture(scope="session")
def tiny(corpus: Path, tokenizer: Path) -> tuple[str, ...]:
    """Options of a run that takes a fraction of a second."""
    options = {
        "steps": 5,
        "batch-size": 2,
        "seq-len": 8,
        "vocab-size": N_VOCABULARY,
        "hidden-dim": 8,
        "layers": 1,
        "heads": 2,
        "device": "cpu",
        "corpus": corpus,
        "tokenizer": tokenizer,
    }
    return tuple(f"--{name}={value}" for name, value in options.items())


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> Path:
    """A store that `train` wrote, never to be written to."""
    store = tmp_path_factory.mktemp("trained") / "run.zarr"
    succeeds("train", store, *tiny)
    return store


@pytest.fixture
def shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show every bit of progress, as in five seconds a line."""
    monkeypatch.setattr("thimble_zarr.cli.progress.LINE_INTERVAL_S", 0.0)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10**12, used=10**12 - 1000, free=1000)
    monkeypatch.setattr("thimble_zarr.experiment.plan.shutil.disk_usage", lambda path: usage)
