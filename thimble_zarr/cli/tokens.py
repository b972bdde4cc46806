"""`tokens`: train a tokenizer, count tokens, write tokenizer and mask."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import QUIET, check_directory
from thimble_zarr.errors import StoreExistsError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.report.text import aligned

if TYPE_CHECKING:
    from thimble_zarr.cli.progress import Progress
    from thimble_zarr.experiment.corpus import Corpus
    from thimble_zarr.format.schema import TokenLabels

N_SHOWN = 10

_FILE = click.Path(path_type=Path)


@click.command(short_help="Count the tokens of a text file: which are live, which dead?")
@click.argument("corpus", type=_FILE, required=False)
@click.option("--tokenizer", type=_FILE, help="Use this tokenizer (tokenizers JSON).")
@click.option(
    "--train-on",
    type=_FILE,
    multiple=True,
    help="Train a byte-level BPE tokenizer on this text file; may be repeated.  "
    "[default: use the default tokenizer]",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=256),
    default=TrainingConfig.vocab_size,
    show_default=True,
    help="Size of the vocabulary to train.",
)
@click.option("--save-tokenizer", type=_FILE, help="Write the tokenizer to this file.")
@click.option("--save-mask", type=_FILE, help="Write live_mask and dead_mask to this file.")
@QUIET
def tokens(
    corpus: Path | None,
    *,
    tokenizer: Path | None,
    train_on: tuple[Path, ...],
    vocab_size: int,
    save_tokenizer: Path | None,
    save_mask: Path | None,
    quiet: bool,
) -> None:
    """Count the tokens of CORPUS, a text file, and tell live tokens from dead ones.

    A token is dead if it never occurs in the corpus. To get dead tokens, train the tokenizer on
    more text than the corpus (repeat --train-on). Without CORPUS the default corpus is counted.
    With a plain byte-level BPE tokenizer a text may be larger than memory, if it has spaces or line
    ends to cut it at. A token that is only a part of a character is shown as bytes: <0xE4>.
    """
    if tokenizer is not None and train_on:
        raise click.UsageError("--tokenizer and --train-on exclude each other")
    for target in filter(None, (save_tokenizer, save_mask)):
        _check_new(target)
    from thimble_zarr.cli.progress import progress

    with progress("loading corpus and tokenizer", quiet=quiet):
        from thimble_zarr.experiment import vocabulary
        from thimble_zarr.experiment.corpus import read_corpus
        from thimble_zarr.store.token_mask import write_mask

        counted, sources = read_corpus(corpus), [read_corpus(file) for file in train_on]
        if tokenizer is not None:
            trained = vocabulary.load_tokenizer(tokenizer)
        elif not sources:
            trained = vocabulary.read_tokenizer(None, vocab_size=vocab_size)
    if sources:
        n_bytes = sum(source.n_bytes for source in sources)
        with progress("training the tokenizer", unit="B", total=n_bytes, quiet=quiet) as bar:
            texts = (_read(source, bar) for source in sources)
            trained = vocabulary.train_tokenizer(texts, vocab_size)
    with progress("counting tokens", unit="B", total=counted.n_bytes, quiet=quiet) as bar:
        counts = vocabulary.count_tokens(trained, _read(counted, bar))
        labels = vocabulary.label_tokens(trained, counts)
    click.echo(_summary(counted.name, labels))
    if save_tokenizer is not None:
        save_tokenizer.write_text(trained.to_str(), encoding="utf-8")
    if save_mask is not None:
        write_mask(save_mask, labels)
    for file, what in ((save_tokenizer, "Tokenizer"), (save_mask, "Token mask")):
        if file is not None and not quiet:
            click.echo(f"{what} written to {file}")


def _check_new(file: Path) -> None:
    if file.exists():
        raise StoreExistsError(f"{file} exists; choose another name or remove it")
    check_directory(file)


def _read(corpus: "Corpus", bar: "Progress") -> Iterator[str]:
    """Yield a text in chunks, and show how much was read."""
    for chunk in corpus.chunks():
        yield chunk
        bar.update(len(chunk.encode()))


def _summary(corpus: str, labels: "TokenLabels") -> str:
    import numpy as np

    n_occurrences, texts = labels.count, labels.text
    assert n_occurrences is not None
    assert texts is not None
    n_live = int(np.count_nonzero(n_occurrences))
    frequent = np.argsort(-n_occurrences, kind="stable")[: min(n_live, N_SHOWN)]
    dead = np.flatnonzero(n_occurrences == 0)[-N_SHOWN:]
    lines = [
        f"Corpus   {corpus}: {n_occurrences.sum():,} tokens{'' if n_live else ' (it is empty)'}",
        f"Tokens   {len(texts):,}: {n_live:,} live, {len(texts) - n_live:,} dead",
    ]
    if n_live:
        rows = [(f"  {texts[token]!r}", f"{n_occurrences[token]:,}") for token in frequent]
        lines += ["", "Most frequent", aligned(rows)]
    shown = ", ".join(repr(texts[token]) for token in dead)
    return "\n".join([*lines, "", f"Dead, for example: {shown or 'none'}"])
