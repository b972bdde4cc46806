"""Tokens: train a tokenizer, encode a corpus, and tell live tokens from dead ones."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from thimble_zarr.errors import CorpusError
from thimble_zarr.experiment.corpus import cache_file, read_source, stdlib_sources, write_cache
from thimble_zarr.format.labels import read_mask
from thimble_zarr.format.schema import TokenLabels

_PIECE_CHARACTERS = 2**16
_PIECES_A_BATCH = 16
_SINGLE_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, which can encode any text without unknown tokens.

    Parameters
    ----------
    texts
        What to train on.
    vocab_size
        Tokens wanted, at least the 256 bytes.

    Raises
    ------
    CorpusError
        If the text is too small for so many tokens, or fewer than 256 are wanted.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise CorpusError(
            f"{vocab_size} tokens were asked for and {tokenizer.get_vocab_size()} came out: a "
            "byte-level tokenizer has at least 256, and a larger one needs more text"
        )
    return tokenizer


def read_tokenizer(file: Path | None, *, vocab_size: int) -> Tokenizer:
    """Return the tokenizer in a file, or the default one of `vocab_size` tokens.

    Raises
    ------
    CorpusError
        If the file is no tokenizer, or its vocabulary is not `vocab_size` tokens.
    """
    tokenizer = _default_tokenizer(vocab_size) if file is None else load_tokenizer(file)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise CorpusError(
            f"the tokenizer {file} has {found:,} tokens and the model {vocab_size:,}; "
            f"pass --vocab-size {found}"
        )
    return tokenizer


def load_tokenizer(file: Path) -> Tokenizer:
    """Return the tokenizer in a file.

    Raises
    ------
    CorpusError
        If the file is no tokenizer, or its ids have holes.
    """
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise CorpusError(
            f"cannot read the tokenizer {file}: {error}; it must be the JSON of a `tokenizers` "
            "tokenizer, such as `thimble-zarr tokens` writes"
        ) from error
    n_tokens = tokenizer.get_vocab_size()
    if sorted(tokenizer.get_vocab().values()) != list(range(n_tokens)):
        raise CorpusError(
            f"the tokenizer {file} has {n_tokens:,} tokens, but their ids are not 0 to "
            f"{n_tokens - 1:,}; an embedding has a row for each id, so there must be no holes"
        )
    tokenizer.no_truncation()  # for batches of inputs, not for a corpus
    tokenizer.no_padding()
    return tokenizer


def _default_tokenizer(vocab_size: int) -> Tokenizer:
    cached = cache_file(f"tokenizer-{vocab_size}.json")
    if not cached.exists():
        tokenizer = train_tokenizer(map(read_source, stdlib_sources()), vocab_size)
        write_cache(cached, tokenizer.to_str())
    return load_tokenizer(cached)


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the token ids of a text, int64, shape `(n,)`.

    An encoding takes hundreds of bytes a token while it is made, so the text is encoded in pieces,
    cut where a line begins. A tokenizer that might notice the cut gets the whole text at once.
    """
    if not _never_joins_lines(tokenizer):
        return np.array(tokenizer.encode(text).ids, dtype=np.int64)
    pieces = _split_lines(text)
    encoded = [np.empty(0, dtype=np.int64)]
    while batch := list(islice(pieces, _PIECES_A_BATCH)):
        encoded += [
            np.array(piece.ids, dtype=np.int64) for piece in tokenizer.encode_batch_fast(batch)
        ]
    return np.concatenate(encoded)


def _never_joins_lines(tokenizer: Tokenizer) -> bool:
    """Return whether cutting after a single line end changes no token.

    So it is for a plain byte-level BPE: its pattern (that of GPT-2) never joins a letter to what is
    beyond a line end, and it adds nothing to a text.
    """
    parts = json.loads(tokenizer.to_str())
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    pattern = parts["pre_tokenizer"] or {}
    return (
        {key: pattern.get(key) for key in plain} == plain
        and parts["normalizer"] is None
        and (parts["post_processor"] or plain)["type"] == "ByteLevel"
        and not any(
            "\n" in token["content"] or token["lstrip"] or token["rstrip"]
            for token in parts["added_tokens"]
        )
    )


def _split_lines(text: str) -> Iterator[str]:
    """Cut a text after line ends that stand alone."""
    start = 0
    while start < len(text):
        cut = _SINGLE_LINE_END.search(text, start + _PIECE_CHARACTERS)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end


def label_tokens(
    tokenizer: Tokenizer, ids: np.ndarray, *, mask_file: Path | None = None
) -> TokenLabels:
    """Count tokens in an encoded corpus and label them.

    Parameters
    ----------
    tokenizer
        Gives the number of tokens and their texts.
    ids
        The encoded corpus.
    mask_file
        A token mask as the notebook kept it, which then decides what is live and dead.

    Raises
    ------
    CorpusError
        If the mask cannot be read or is of another vocabulary.
    """
    n_tokens = tokenizer.get_vocab_size()
    labels = TokenLabels.from_counts(
        np.bincount(ids, minlength=n_tokens), [_text(tokenizer, token) for token in range(n_tokens)]
    )
    if mask_file is None:
        return labels
    live = read_mask(mask_file, n_tokens)
    return TokenLabels(count=labels.count, live=live, dead=~live, text=labels.text)


def _text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as people read it; as the vocabulary spells it where it is half a letter."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" in text or not text:
        return tokenizer.id_to_token(token) or ""
    return text
