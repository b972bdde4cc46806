"""Tokens: train a tokenizer, encode a corpus, and tell live tokens from dead ones.

What cannot be read, or does not fit the other, raises CorpusError.
"""

import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from thimble_zarr import tuning
from thimble_zarr.errors import CorpusError
from thimble_zarr.experiment.corpus import cached, read_source, stdlib_sources
from thimble_zarr.format.labels import printable
from thimble_zarr.format.schema import TokenLabels
from thimble_zarr.store.token_mask import read_mask

_PIECES_A_BATCH = 16
_IDS_AT_ONCE = 2**16

Text = str | Iterable[str]
"""A text, or the parts of it one after the other, cut anywhere."""

# The tokenizer's pattern takes white space as a word of its own, except the last character of it
# before a word: a blank there joins the word. So a cut before that character changes no token.
# Added tokens are split off before the pattern is applied, so white space before one of them is
# taken as at the end of a text; there a cut is safe only before white space that stands alone.
# What is white space for the tokenizer is so for Python, too.
_BEFORE_LAST_SPACE = re.compile(r"(?=[ \t\n\r]\S)")
_BEFORE_LONE_SPACE = re.compile(r"(?<=\S)(?=[ \t\n\r]\S)")

_LIKE_A_BYTE = re.compile(r"<(?=0x[0-9A-F]{2}>)")


def train_tokenizer(texts: Iterable[Text], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, which can encode any text without unknown tokens.

    `vocab_size` is at least the 256 bytes. Of the texts only the different words are held.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _pieces(text, _BEFORE_LAST_SPACE))
    tokenizer.train_from_iterator(pieces, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise CorpusError(
            f"cannot train a tokenizer of {vocab_size:,} tokens on this text, only one of "
            f"{found:,}; pass --vocab-size {found}, or train on more text"
        )
    return tokenizer


def read_tokenizer(file: Path | None, *, vocab_size: int) -> Tokenizer:
    """Return the tokenizer in a file, or the default one, both of `vocab_size` tokens."""

    def train() -> str:
        return train_tokenizer(map(read_source, stdlib_sources()), vocab_size).to_str()

    tokenizer = load_tokenizer(file or cached(f"tokenizer-{vocab_size}.json", train))
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise CorpusError(
            f"the tokenizer {file} has {found:,} tokens and the model {vocab_size:,}; "
            f"pass --vocab-size {found}"
        )
    return tokenizer


def load_tokenizer(file: Path) -> Tokenizer:
    """Return the tokenizer in a file, whose ids must have no holes."""
    if not file.exists():
        raise CorpusError(f"cannot read the tokenizer {file}: there is no such file")
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


def encode(tokenizer: Tokenizer, text: Text) -> np.ndarray:
    """Return the token ids of a text, int32, shape `(n,)`. They are all that is held of it."""
    ids = array("i")
    for encoded in _encoded(tokenizer, text):
        ids.extend(encoded)
    return np.frombuffer(ids, dtype=np.int32) if ids else np.empty(0, dtype=np.int32)


def count_tokens(tokenizer: Tokenizer, text: Text | np.ndarray) -> np.ndarray:
    """Return how often each token occurs in a text, or in its ids: int64, shape `(token,)`."""
    if isinstance(text, np.ndarray):  # in parts, because NumPy counts a copy in int64
        starts = range(0, len(text), _IDS_AT_ONCE)
        parts: Iterable[ArrayLike] = (text[start : start + _IDS_AT_ONCE] for start in starts)
    else:
        parts = _encoded(tokenizer, text)
    n_occurrences = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for ids in parts:
        n_occurrences += np.bincount(ids, minlength=len(n_occurrences))
    return n_occurrences


def _encoded(tokenizer: Tokenizer, text: Text) -> Iterator[list[int]]:
    """Yield the ids of a text, piece by piece, since an encoding takes hundreds of bytes a token.

    A tokenizer whose tokens a cut might change gets the whole text at once.
    """
    cut = _cut(tokenizer)
    if cut is None:
        yield tokenizer.encode(text if isinstance(text, str) else "".join(text)).ids
        return
    pieces = _pieces(text, cut)
    while batch := list(itertools.islice(pieces, _PIECES_A_BATCH)):
        yield from (piece.ids for piece in tokenizer.encode_batch_fast(batch))


def _cut(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return where a text may be cut so that no token changes, None if that is not known.

    It is known for a plain byte-level BPE, which has GPT-2's pattern and adds nothing to a text.
    """
    parts = json.loads(tokenizer.to_str())
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    added = parts["added_tokens"]
    known = (
        plain.items() <= (parts["pre_tokenizer"] or {}).items()
        and parts["normalizer"] is None
        and (parts["post_processor"] or plain)["type"] == "ByteLevel"
        and not any(re.search(r"\s", t["content"]) or t["lstrip"] or t["rstrip"] for t in added)
    )
    if not known:
        return None
    return _BEFORE_LONE_SPACE if added else _BEFORE_LAST_SPACE


def _pieces(text: Text, cut: re.Pattern[str]) -> Iterator[str]:
    """Cut a text into pieces of `piece_characters`, and as many more as there are up to a cut."""
    n_characters, held = tuning.TUNING.piece_characters, ""
    for chunk in [text] if isinstance(text, str) else text:
        searched = max(n_characters, len(held) - 1)  # what the pattern looks ahead
        held += chunk
        start = 0
        while found := cut.search(held, max(start + n_characters, searched)):
            yield held[start : found.start()]
            start = found.start()
        held = held[start:]
    if held:
        yield held


def label_tokens(
    tokenizer: Tokenizer, n_occurrences: np.ndarray, *, mask_file: Path | None = None
) -> TokenLabels:
    """Label tokens by what `count_tokens` counted; a token mask decides what is live and dead."""
    labels = TokenLabels.from_counts(n_occurrences, texts(tokenizer))
    if mask_file is None:
        return labels
    mask = read_mask(mask_file, tokenizer.get_vocab_size())
    return replace(labels, live=mask.live, dead=mask.dead)


def texts(tokenizer: Tokenizer) -> list[str]:
    """Return every token as people read it, no two alike if the tokens are not.

    Bytes that are no text, as of half a letter, are in brackets, as are control characters:
    `<0xE4>`. A token that itself reads so has its own bracket in brackets: `<0x3C>0xE4>`.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    # Of the letters for bytes, those that Latin-1 prints stand for themselves, and those from
    # U+0100 on for the other bytes, in order: as GPT-2 began it.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printed = [ord(letter) for letter in alphabet if ord(letter) < 0x100]
    others = (byte for byte in range(0x100) if byte not in printed)
    is_bytes = decoder.get("type") == "ByteLevel"
    letters = dict(zip(alphabet, [*printed, *others], strict=True)) if is_bytes else {}
    added = tokenizer.get_added_tokens_decoder()
    found = []
    for token in range(tokenizer.get_vocab_size()):
        spelt = tokenizer.id_to_token(token) or ""
        if letters and token not in added and letters.keys() >= {*spelt}:
            text = bytes(letters[letter] for letter in spelt).decode(errors="surrogateescape")
        else:
            text = tokenizer.decode([token], skip_special_tokens=False)
            if not text or "\ufffd" in text:  # the decoder has no letter for it
                found.append(printable(spelt))
                continue
        found.append(printable(_LIKE_A_BYTE.sub("<0x3C>", text)))
    return found
