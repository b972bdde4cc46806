"""`tokens`: train a tokenizer, count tokens, write tokenizer and mask."""

from pathlib import Path

import click

from thimble_zarr.cli.options import aligned
from thimble_zarr.errors import StoreExistsError
from thimble_zarr.experiment.config import TrainingConfig

N_SHOWN = 10

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("corpus", type=_FILE, required=False)
@click.option("--tokenizer", type=_FILE, help="Use this tokenizer; train none.")
@click.option(
    "--train-on",
    type=_FILE,
    multiple=True,
    help="Train a byte-level BPE on this text; may be repeated.  [default: the default tokenizer]",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=256),
    default=TrainingConfig.vocab_size,
    show_default=True,
    help="Tokens to train.",
)
@click.option("--save-tokenizer", type=_FILE, help="Write the tokenizer (tokenizers JSON).")
@click.option("--save-mask", type=_FILE, help="Write live_mask and dead_mask (safetensors).")
def tokens(
    corpus: Path | None,
    *,
    tokenizer: Path | None,
    train_on: tuple[Path, ...],
    vocab_size: int,
    save_tokenizer: Path | None,
    save_mask: Path | None,
) -> None:
    """Count the tokens of CORPUS, a text file, and tell live tokens from dead ones.

    A token is dead if it never occurs in the corpus. Train the tokenizer on more text than the
    corpus (--train-on, repeated) to have dead tokens. Without CORPUS it counts the default corpus.
    """
    if tokenizer is not None and train_on:
        raise click.UsageError("--tokenizer and --train-on exclude each other")
    for file in (save_tokenizer, save_mask):
        if file is not None and file.exists():
            raise StoreExistsError(f"{file} exists; choose another name or remove it")

    import numpy as np

    from thimble_zarr.experiment.corpus import read_corpus
    from thimble_zarr.experiment.vocabulary import (
        encode,
        label_tokens,
        load_tokenizer,
        read_tokenizer,
        train_tokenizer,
    )
    from thimble_zarr.format.labels import write_mask

    text = read_corpus(corpus)
    if train_on:
        trained = train_tokenizer((read_corpus(file).text for file in train_on), vocab_size)
    elif tokenizer is not None:
        trained = load_tokenizer(tokenizer)
    else:
        trained = read_tokenizer(None, vocab_size=vocab_size)
    ids = encode(trained, text.text)
    labels = label_tokens(trained, ids)
    assert labels.count is not None
    assert labels.dead is not None
    assert labels.text is not None

    n_dead = int(labels.dead.sum())
    click.echo(f"Corpus   {text.name}: {len(ids):,} tokens")
    click.echo(
        f"Tokens   {len(labels.dead):,}: {len(labels.dead) - n_dead:,} live, {n_dead:,} dead"
    )
    frequent = np.argsort(-labels.count, kind="stable")[:N_SHOWN]
    click.echo("\nMost frequent")
    click.echo(aligned([(f"  {labels.text[i]!r}", f"{labels.count[i]:,}") for i in frequent]))
    dead = [repr(labels.text[i]) for i in np.flatnonzero(labels.dead)[-N_SHOWN:]]
    click.echo(f"\nDead, for example: {', '.join(dead) or 'none'}")
    if save_tokenizer is not None:
        save_tokenizer.write_text(trained.to_str(), encoding="utf-8")
        click.echo(f"\nTokenizer written to {save_tokenizer}")
    if save_mask is not None:
        write_mask(save_mask, labels)
        click.echo(f"Token mask written to {save_mask}")
