"""`tokens`: tokenizers, counts and masks."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer

from tests.support.commands import N_VOCABULARY, fails, succeeds
from thimble_zarr import open_dataset
from thimble_zarr.experiment.vocabulary import train_tokenizer


def test_tokens_trains_counts_and_writes_what_train_can_use(
    tmp_path: Path, corpus: Path, tiny: tuple[str, ...]
) -> None:
    more = tmp_path / "more.txt"
    more.write_text("zebra quagga zebroid " * 50, encoding="utf-8")
    tokenizer, mask = tmp_path / "tokenizer.json", tmp_path / "mask.safetensors"
    result = succeeds(
        "tokens", corpus, "--train-on", corpus, "--train-on", more, "--vocab-size", 310,
        "--save-tokenizer", tokenizer, "--save-mask", mask,
    )  # fmt: skip
    ids = Tokenizer.from_file(str(tokenizer)).encode(corpus.read_text(encoding="utf-8")).ids
    n_live = len(set(ids))
    assert f"{len(ids):,} tokens" in result.stdout
    assert f"310: {n_live} live, {310 - n_live} dead" in result.stdout
    masks = safetensors.torch.load_file(mask)
    assert torch.nonzero(masks["live_mask"]).flatten().tolist() == sorted(set(ids))
    assert "Ġzebra" in Tokenizer.from_file(str(tokenizer)).get_vocab()

    masks["live_mask"][ids[0]] = False  # so that it shows whose mask is used
    safetensors.torch.save_file({"live_mask": masks["live_mask"]}, mask)
    store = tmp_path / "run.zarr"
    succeeds(
        "train", store, *tiny, "--vocab-size", 310, "--tokenizer", tokenizer, "--token-mask", mask
    )
    ds = open_dataset(store)
    assert ds.live.values.tolist() == masks["live_mask"].tolist()
    assert ds.dead.values.tolist() == (~masks["live_mask"]).tolist()
    assert ds.n_occurrences.values.tolist() == [ids.count(token) for token in range(310)]


def test_tokens_counts_with_a_tokenizer_there_is(corpus: Path, tokenizer: Path) -> None:
    lines = succeeds("tokens", corpus, "--tokenizer", tokenizer).stdout.splitlines()
    loaded = Tokenizer.from_file(str(tokenizer))
    ids = loaded.encode(corpus.read_text(encoding="utf-8")).ids
    counts = sorted((ids.count(token) for token in set(ids)), reverse=True)
    first = lines.index("Most frequent") + 1
    assert [int(line.split()[-1]) for line in lines[first : first + 10]] == counts[:10]
    assert lines[-1].startswith("Dead, for example: ")


def test_tokens_without_dead_ones_says_so(tmp_path: Path) -> None:
    corpus = tmp_path / "bytes.txt"
    corpus.write_text("".join(map(chr, range(0x250))) + "".join(map(chr, range(0x800, 0xD800, 64))))
    result = succeeds("tokens", corpus, "--train-on", corpus, "--vocab-size", 256)
    loaded = train_tokenizer([corpus.read_text()], 256)
    dead = set(range(256)) - set(loaded.encode(corpus.read_text()).ids)
    assert f"{len(dead)} dead" in result.stdout
    assert dead  # some bytes, such as 255, are in no UTF-8 text


def test_tokens_of_an_empty_corpus_are_all_dead(tmp_path: Path, tokenizer: Path) -> None:
    corpus = tmp_path / "empty.txt"
    corpus.touch()
    stdout = succeeds("tokens", corpus, "--tokenizer", tokenizer).stdout
    assert "empty.txt: 0 tokens (it is empty)\n" in stdout
    assert f"0 live, {N_VOCABULARY} dead" in stdout
    assert "Most frequent" not in stdout


def test_tokens_are_shown_as_text(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("ää ää 数 字", encoding="utf-8")
    stdout = succeeds("tokens", corpus, "--train-on", corpus, "--vocab-size", 257).stdout
    shown = stdout.partition("Most frequent\n")[2]
    assert "  'ä' " in shown
    assert "  '<0xE6>' " in shown
    assert "Ã" not in shown


def test_tokens_of_a_directory_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    assert "it is a directory; give a text file" in fails(
        2, "tokens", tmp_path, "--tokenizer", tokenizer
    )


@pytest.mark.usefixtures("shown_at_once")
def test_tokens_shows_progress_unless_it_is_quiet(tmp_path: Path, corpus: Path) -> None:
    args = ("tokens", corpus, "--train-on", corpus, "--vocab-size", 300)
    result = succeeds(*args)
    assert "training the tokenizer: " in result.stderr
    assert "counting tokens: " in result.stderr
    assert "(100%)" in result.stderr
    quiet = succeeds(*args, "--quiet", "--save-mask", tmp_path / "mask")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_tokens_never_replaces_a_file(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("precious")
    for flag in ("--save-tokenizer", "--save-mask"):
        assert str(file) in fails(2, "tokens", corpus, "--tokenizer", tokenizer, flag, file)
        assert file.read_text() == "precious"


@pytest.mark.parametrize("flag", ["--save-tokenizer", "--save-mask"])
def test_tokens_tells_what_it_cannot_write(
    tmp_path: Path, corpus: Path, tokenizer: Path, flag: str
) -> None:
    for file in (tmp_path / "nothing" / "file", corpus / "file"):
        message = fails(3, "tokens", "not-even-read", "--tokenizer", tokenizer, flag, file)
        assert f"cannot write {file}: there is no directory {file.parent}" in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--tokenizer", "x", "--train-on", "y"], "exclude each other"),
        (["--vocab-size", "255"], "255 is not in the range"),
        (["--tokenizer", "/nothing"], "cannot read the tokenizer /nothing"),
        (["--train-on", "/nothing"], "cannot read the corpus /nothing"),
        (["--train-on", "CORPUS", "--vocab-size", "9000"], "or train on more text"),
    ],
)
def test_tokens_refuses_what_cannot_work(corpus: Path, args: list[str], expected: str) -> None:
    args = [str(corpus) if arg == "CORPUS" else arg for arg in args]
    assert expected in fails(2, "tokens", corpus, *args)


def test_tokens_of_a_corpus_that_is_not_there_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "nothing.txt"
    assert str(file) in fails(2, "tokens", file, "--tokenizer", tokenizer)
