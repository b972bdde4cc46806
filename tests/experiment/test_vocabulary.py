import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from thimble_zarr import tuning
from thimble_zarr.errors import CorpusError
from thimble_zarr.experiment.vocabulary import (
    count_tokens,
    encode,
    label_tokens,
    load_tokenizer,
    read_tokenizer,
    texts,
    train_tokenizer,
)
from thimble_zarr.store.token_mask import write_mask

SAMPLE = """The first step is the initial state, the second is not.
The gradient of a step\tis what the step consumed;
  the weights are what it produced.

The third step's weights are 1234 and 56.  \r
Tönt, schön, 数字, naïve, 🙂!
The end of the steps, and the weights of the steps.
"""
"""Lines that begin alike, so that a tokenizer free to join lines learns to."""

NASTY = [
    "",
    "\n",
    "\n\n\n",
    " ",
    "no line end",
    "one\ntwo\nthree\n",
    "blank\n\nlines\n\n\nhere\n",
    "trailing  \nspaces \t\n here\n",
    "windows\r\nline\r\nends\r\n\r\n",
    "old\rmac\r",
    "no\u00a0break\u2028spaces\u2029and\u0085more\u3000\nhere",
    "\x1c\nfile\x1d\nseparators\x1f\n\x1e",
    "\u180e\nvowel\n\u200bzero\nwidth\ufeff\nmark",
    "🙂\n数字\nnaïve\ncombining\n\u0301accent\n",
    "don't\n'sup\n's 1\n2 3\n",
    "The\nThe\nThe steps\nare",
    "a\n<mask>\nb <mask> c",
    "aa  <mask>\n\n<mask>",
    "aa!\x1cb!!\x1c a",
]


def byte_level(sample: str = SAMPLE, vocab_size: int = 300) -> Tokenizer:
    return train_tokenizer([sample], vocab_size)


def of_white_space() -> Tokenizer:
    """Many tokens are runs of white space, so that a cut within one is seen."""
    rng = np.random.default_rng(0)
    words = rng.choice([" ", "  ", "\t", "\n", "\r\n", "\x1c", "!", "a", "\u3000"], 20_000)
    return byte_level("".join(words), 700)


def with_special_token() -> Tokenizer:
    tokenizer = of_white_space()
    tokenizer.add_special_tokens(["<mask>"])
    return tokenizer


def with_prefix_space() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def with_first_token() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def with_stripping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def with_pattern() -> Tokenizer:
    """Pre-tokenized as newer models do: line ends belong to the punctuation before them."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _trained_bpe(tokenizer)


def of_whole_lines() -> Tokenizer:
    """No pre-tokenizer at all: a token may reach from one line into the next."""
    tokenizer = Tokenizer(models.BPE())
    return _trained_bpe(tokenizer)


def over_line_ends() -> Tokenizer:
    """As `ByteLevel`, but the regex does not run: "\\nThe" becomes one token, "\\na" does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _trained_bpe(tokenizer)


def with_token_over_a_line_end() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("one\ntwo", normalized=False)])
    return tokenizer


def with_token_that_strips() -> Tokenizer:
    """As RoBERTa's: the mask takes the white space beside it, line ends too."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return tokenizer


def of_words() -> Tokenizer:
    """Drops white space, and does not know most words."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "The": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _trained_bpe(tokenizer: Tokenizer) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if tokenizer.pre_tokenizer else [],
    )
    tokenizer.train_from_iterator([SAMPLE * 3], trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    maker.__name__: maker
    for maker in (
        byte_level,
        of_white_space,
        with_special_token,
        with_prefix_space,
        with_first_token,
        with_stripping,
        with_pattern,
        of_whole_lines,
        over_line_ends,
        with_token_over_a_line_end,
        with_token_that_strips,
        of_words,
    )
}

MADE: dict[str, Tokenizer] = {}


@contextmanager
def pieces(piece_characters: int) -> Iterator[None]:
    """Cut texts into pieces of at least so many characters."""
    replaced = replace(tuning.TUNING, piece_characters=piece_characters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thimble_zarr.tuning.TUNING", replaced)
        yield


def made(kind: str) -> Tokenizer:
    if kind not in MADE:
        MADE[kind] = KINDS[kind]()
    return MADE[kind]


@pytest.mark.parametrize("kind", KINDS)
@pieces(1)
def test_encoding_is_that_of_the_whole_text_at_once(kind: str) -> None:
    tokenizer = made(kind)
    for text in [*NASTY, SAMPLE, "".join(NASTY), SAMPLE * 20]:
        ids = encode(tokenizer, text)
        assert (ids.dtype, ids.ndim) == (np.int32, 1)
        assert ids.tolist() == tokenizer.encode(text).ids, repr(text)


PARTS = ["\n", "\n", "\r\n", "\n\n", " ", "  ", "\t", "The", "the", " step", "a", "'s", "1", "."]
PARTS += [
    "!",
    "\u3000",
    "\u0301",
    "\u00a0",
    "\u2028",
    "\u0085",
    "\x1c",
    "\u180e",
    "é",
    "🙂",
    "数",
    "one\ntwo",
    "<mask>",
]

pieces_of_text = st.lists(st.sampled_from(PARTS), max_size=40).map("".join)


def chunks_of(text: str, cuts: list[int]) -> list[str]:
    """Cut a text anywhere, as whoever reads a file does."""
    ends = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(
    text=pieces_of_text | st.text(max_size=60),
    cuts=st.lists(st.integers(0, 1000), max_size=5),
    piece_characters=st.integers(1, 5),
)
def test_encoding_any_text_is_that_of_the_whole_text_at_once(
    kind: str, text: str, cuts: list[int], piece_characters: int
) -> None:
    tokenizer = made(kind)
    expected = tokenizer.encode(text).ids
    chunks = chunks_of(text, cuts)
    with pieces(piece_characters):
        assert encode(tokenizer, text).tolist() == expected
        assert encode(tokenizer, iter(chunks)).tolist() == expected
        counted = count_tokens(tokenizer, iter(chunks))
    assert counted.dtype == np.int64
    assert counted.tolist() == np.bincount(expected, minlength=len(counted)).tolist()


@settings(max_examples=50, deadline=None)
@given(text=pieces_of_text | st.text(max_size=60), cuts=st.lists(st.integers(0, 1000), max_size=5))
def test_training_in_pieces_gives_the_tokenizer_of_the_whole_text(
    text: str, cuts: list[int]
) -> None:
    text = SAMPLE + text
    whole = Tokenizer.from_str(byte_level("", 256).to_str())
    whole.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=290,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    with pieces(1):
        trained = train_tokenizer([iter(chunks_of(text, cuts))], 290)
    assert trained.to_str() == whole.to_str()


SHORTER = 16
"""Long texts are of so many pieces as a long text has, and these so much shorter."""


@pytest.mark.parametrize("kind", ["byte_level", "with_first_token"])
def test_a_long_text_is_encoded_as_a_whole_too(kind: str) -> None:
    tokenizer = made(kind)
    rng = np.random.default_rng(0)
    words = rng.choice(
        ["The ", "step ", "weights", "\n", ".\n", "\n\n", "\r\n", "é "], 200_000 // SHORTER
    )
    text = "".join(words)
    with pieces(tuning.TUNING.piece_characters // SHORTER):
        assert len(text) > 5 * tuning.TUNING.piece_characters
        assert encode(tokenizer, text).tolist() == tokenizer.encode(text).ids


def test_no_tokenizer_call_gets_more_than_a_few_pieces_of_a_long_text() -> None:
    tokenizer, lengths = made("byte_level"), []

    def one(text: str) -> Encoding:
        lengths.append(len(text))
        return tokenizer.encode(text)

    def batch(texts: list[str]) -> list[Encoding]:
        lengths.append(sum(map(len, texts)))
        return tokenizer.encode_batch_fast(texts)

    text = SAMPLE * (15_000 // SHORTER)
    counted = SimpleNamespace(encode=one, encode_batch_fast=batch, to_str=tokenizer.to_str)
    with pieces(tuning.TUNING.piece_characters // SHORTER):
        ids = encode(counted, text)
        assert max(lengths) < 16 * (tuning.TUNING.piece_characters + 100)
    assert tokenizer.decode(ids.tolist()) == text
    assert sum(lengths) == len(text)


@pytest.mark.parametrize("text", ["step " * 400, "数\n\n字\n\n" * 400, " \n \t." * 400])
def test_a_text_without_lines_that_touch_is_cut_too(text: str) -> None:
    tokenizer, batches = made("byte_level"), []

    def batch(texts: list[str]) -> list[Encoding]:
        batches.append(max(map(len, texts)))
        return tokenizer.encode_batch_fast(texts)

    counted = SimpleNamespace(encode_batch_fast=batch, to_str=tokenizer.to_str)
    with pieces(1):
        assert encode(counted, text).tolist() == tokenizer.encode(text).ids
    assert max(batches) <= 6


def cut_to_length(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(max_length=8)


def filled_up_in_batches(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(pad_id=0, pad_token="!")


def filled_up_to_length(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(pad_id=0, pad_token="!", length=1000)


@pytest.mark.parametrize("spoil", [cut_to_length, filled_up_in_batches, filled_up_to_length])
def test_what_a_tokenizer_file_says_of_batches_does_not_reach_the_corpus(
    tmp_path: Path, spoil: Callable[[Tokenizer], None]
) -> None:
    tokenizer = byte_level()
    expected = tokenizer.encode(SAMPLE).ids
    spoil(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    with pieces(1):
        assert encode(loaded, SAMPLE).tolist() == expected


def test_a_trained_tokenizer_has_the_size_asked_for_and_loses_nothing() -> None:
    tokenizer = train_tokenizer([SAMPLE], 300)
    assert tokenizer.get_vocab_size() == 300
    for text in [*NASTY, SAMPLE]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_256_bytes_alone_are_a_tokenizer() -> None:
    tokenizer = train_tokenizer([SAMPLE], 256)
    assert encode(tokenizer, "ab🙂").size == 2 + 4
    assert tokenizer.decode(encode(tokenizer, SAMPLE).tolist()) == SAMPLE


def test_a_tokenizer_learns_from_all_of_its_texts() -> None:
    first, second = "zebra " * 50, "quagga " * 50
    known = set(train_tokenizer(iter([first, second]), 267).get_vocab())
    assert {"Ġzebra", "Ġquagga"} <= known


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_tokenizer([SAMPLE], 300).to_str() == train_tokenizer([SAMPLE], 300).to_str()


@pytest.mark.parametrize(("text", "size"), [(SAMPLE, 255), (SAMPLE, 1), ("ab", 300), ("", 257)])
def test_a_size_the_text_cannot_give_is_refused(text: str, size: int) -> None:
    with pytest.raises(
        CorpusError, match=rf"a tokenizer of {size:,} tokens on this text, only one of [\d,]+;"
    ):
        train_tokenizer([text], size)


def test_a_tokenizer_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    assert read_tokenizer(file, vocab_size=300).to_str() == byte_level().to_str()


def test_a_tokenizer_of_another_size_is_refused_with_the_option_to_pass(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    with pytest.raises(CorpusError, match=r"has 300 tokens and the model 10,000.*--vocab-size 300"):
        read_tokenizer(file, vocab_size=10_000)


@pytest.mark.parametrize("content", [b"", b"{}", b"text", b"\xff\x00", b'{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        load_tokenizer(file)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(CorpusError, match="cannot read the tokenizer"):
            load_tokenizer(file)


def test_a_tokenizer_whose_ids_have_holes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer = of_words()
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] = {"[UNK]": 0, "the": 1, "The": 9}
    file.write_text(json.dumps(content))

    def read_and_label() -> None:
        loaded = read_tokenizer(file, vocab_size=3)
        label_tokens(loaded, count_tokens(loaded, encode(loaded, "the The")))

    with pytest.raises(CorpusError):  # at the latest where a token beyond the vocabulary occurs
        read_and_label()


def test_tokens_are_counted_as_they_occur() -> None:
    tokenizer = made("byte_level")
    ids = np.array(tokenizer.encode(SAMPLE).ids)
    labels = label_tokens(tokenizer, count_tokens(tokenizer, ids))
    counts = [int((ids == token).sum()) for token in range(300)]
    assert labels.count is not None
    assert labels.count.tolist() == counts
    assert labels.count.dtype == np.int64
    assert labels.live is not None
    assert labels.live.tolist() == [count > 0 for count in counts]
    assert labels.dead is not None
    assert labels.dead.tolist() == [count == 0 for count in counts]
    assert 0 < int(labels.dead.sum()) < 300


def test_every_token_has_a_text_that_people_can_read() -> None:
    tokenizer = made("byte_level")
    labels = label_tokens(tokenizer, count_tokens(tokenizer, np.array([0])))
    assert labels.text is not None
    assert len(labels.text) == 300
    assert all(labels.text)
    texts = dict(zip(range(300), labels.text, strict=True))
    for token in tokenizer.encode(" step the weights\n").ids:
        assert texts[token] == tokenizer.decode([token])
    assert " step" in labels.text
    assert "\ufffd" not in "".join(labels.text)


def test_bytes_that_are_no_text_are_told_from_letters() -> None:
    """A byte-level vocabulary writes 'ä' for the first byte of most Chinese letters."""
    tokenizer = byte_level("ää ää", 257)
    found = dict(zip(texts(tokenizer), range(257), strict=True))
    assert len(found) == 257
    assert tokenizer.id_to_token(found["<0xE4>"]) == "ä"
    assert tokenizer.encode("ä").ids == [found["ä"]]
    assert tokenizer.encode("\0").ids == [found["<0x00>"]]
    assert {"\n", "\t", " "} <= set(found)


def test_letters_of_several_bytes_are_decoded() -> None:
    tokenizer = byte_level("数字数字 数字数字", 262)
    assert "数字" in texts(tokenizer)


def test_a_token_that_reads_like_a_byte_is_told_from_it() -> None:
    tokenizer = over_line_ends()
    tokenizer.train_from_iterator(
        ["<0xE4>"] * 9,
        trainers.BpeTrainer(
            vocab_size=263,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<0x00>"])
    found = texts(tokenizer)
    for text in ("<0x00>", "<0xE4>"):
        (token,) = tokenizer.encode(text).ids
        assert found[token] == text.replace("<", "<0x3C>")
    assert len(set(found)) == len(found)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_no_two_tokens_read_alike(text: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text * 3], trainer)
    found = texts(tokenizer)
    assert len(set(found)) == len(found)


def test_what_was_counted_is_labelled_as_what_was_encoded() -> None:
    tokenizer = made("byte_level")
    expected = label_tokens(tokenizer, count_tokens(tokenizer, encode(tokenizer, SAMPLE)))
    labels = label_tokens(tokenizer, count_tokens(tokenizer, SAMPLE))
    for name in ("count", "live", "dead"):
        np.testing.assert_array_equal(getattr(labels, name), getattr(expected, name))
    assert labels.text == expected.text


def test_special_tokens_have_their_text() -> None:
    tokenizer = made("with_first_token")
    labels = label_tokens(tokenizer, count_tokens(tokenizer, np.array([0])))
    assert labels.text is not None
    assert labels.text[300] == "<s>"


@pytest.fixture
def mask() -> np.ndarray:
    """Live and dead as no corpus here would have them."""
    return np.arange(300) % 3 == 0


def write_tensors(file: Path, **tensors: torch.Tensor) -> Path:
    safetensors.torch.save_file(tensors, file)
    return file


def test_a_mask_decides_what_is_live(tmp_path: Path, mask: np.ndarray) -> None:
    live = torch.tensor(mask)
    files = [
        write_tensors(tmp_path / "both", live_mask=live, dead_mask=~live),
        write_tensors(tmp_path / "live", live_mask=live),
        write_tensors(tmp_path / "dead", dead_mask=~live),
        write_tensors(tmp_path / "bytes", live_mask=live.to(torch.uint8)),
        write_tensors(tmp_path / "floats", dead_mask=(~live).float()),
    ]
    tokenizer = made("byte_level")
    ids = np.array([5, 5, 7])
    for file in files:
        labels = label_tokens(tokenizer, count_tokens(tokenizer, ids), mask_file=file)
        assert labels.live is not None
        assert (labels.live.dtype, labels.live.tolist()) == (np.bool_, mask.tolist())
        assert labels.dead is not None
        assert (labels.dead.dtype, labels.dead.tolist()) == (np.bool_, (~mask).tolist())
        assert labels.count is not None  # still counted, not made up
        assert np.flatnonzero(labels.count).tolist() == [5, 7]
        assert labels.count.shape == (300,)
        assert labels.text is not None


def test_a_written_mask_is_read_as_the_notebook_reads_it(tmp_path: Path) -> None:
    tokenizer = made("byte_level")
    ids = np.array(tokenizer.encode(SAMPLE).ids)
    write_mask(tmp_path / "mask.safetensors", label_tokens(tokenizer, count_tokens(tokenizer, ids)))
    mask_data = safetensors.torch.load_file(tmp_path / "mask.safetensors")
    assert mask_data.keys() == {"live_mask", "dead_mask"}
    assert mask_data["live_mask"].dtype == torch.bool
    live_mask, dead_mask = mask_data["live_mask"].bool(), mask_data["dead_mask"].bool()
    assert (
        torch.flatnonzero(live_mask).tolist() == sorted(set(ids.tolist()))
        if hasattr(torch, "flatnonzero")
        else torch.nonzero(live_mask).flatten().tolist() == sorted(set(ids.tolist()))
    )
    assert torch.equal(dead_mask, ~live_mask)


def test_a_mask_survives_writing_and_reading(tmp_path: Path, mask: np.ndarray) -> None:
    tokenizer = made("byte_level")
    first = write_tensors(tmp_path / "first", live_mask=torch.tensor(mask))
    ids = np.array([1])
    write_mask(
        tmp_path / "second", label_tokens(tokenizer, count_tokens(tokenizer, ids), mask_file=first)
    )
    labels = label_tokens(tokenizer, count_tokens(tokenizer, ids), mask_file=tmp_path / "second")
    assert labels.live is not None
    assert labels.live.tolist() == mask.tolist()


@pytest.mark.parametrize("shape", [(299,), (301,), (300, 1), (0,)])
def test_a_mask_of_another_vocabulary_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = write_tensors(tmp_path / "mask", live_mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(CorpusError, match=r"shape .*vocabulary has 300"):
        label_tokens(made("byte_level"), np.zeros(300, int), mask_file=file)


def test_masks_that_contradict_each_other_are_refused(tmp_path: Path, mask: np.ndarray) -> None:
    live = torch.tensor(mask)
    file = write_tensors(tmp_path / "mask", live_mask=live, dead_mask=live.clone())
    with pytest.raises(CorpusError, match="mask"):
        label_tokens(made("byte_level"), np.zeros(300, int), mask_file=file)


def test_tensors_that_are_no_masks_are_refused_and_named(tmp_path: Path) -> None:
    file = write_tensors(tmp_path / "run", W=torch.ones(300), losses=torch.ones(3))
    with pytest.raises(CorpusError, match=r"neither live_mask nor dead_mask, only .*losses"):
        label_tokens(made("byte_level"), np.zeros(300, int), mask_file=file)


@pytest.mark.parametrize("content", [b"", b"live_mask", b"\x00" * 40])
def test_a_file_that_is_no_mask_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mask.safetensors"
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=r"cannot read the token mask .*mask\.safetensors"):
        label_tokens(made("byte_level"), np.zeros(300, int), mask_file=file)


def test_a_mask_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CorpusError, match="cannot read the token mask"):
            label_tokens(made("byte_level"), np.zeros(300, int), mask_file=file)


def test_a_bfloat16_tensor_beside_the_mask_does_no_harm(tmp_path: Path, mask: np.ndarray) -> None:
    file = write_tensors(
        tmp_path / "mask", live_mask=torch.tensor(mask), W=torch.ones(3, dtype=torch.bfloat16)
    )
    labels = label_tokens(made("byte_level"), np.zeros(300, int), mask_file=file)
    assert labels.live is not None
    assert labels.live.tolist() == mask.tolist()


def test_a_decoder_that_adds_or_drops_spaces_still_gives_texts() -> None:
    tokenizer = of_words()
    tokenizer.decoder = decoders.WordPiece()
    labels = label_tokens(tokenizer, count_tokens(tokenizer, np.array([0, 1])))
    assert labels.text is not None
    assert list(labels.text) == ["[UNK]", "the", "The"]
