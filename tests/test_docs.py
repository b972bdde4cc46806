"""The documents: their commands and code run, their output is real, their links lead somewhere."""

import ast
import json
import re
from pathlib import Path
from subprocess import CalledProcessError

import click
import numpy as np
import pytest

import thimble_zarr
from benchmarks import faults
from benchmarks.__main__ import EARLY_STEP, markdown
from benchmarks.peers import report
from benchmarks.peers.report import LARGER
from tests.support.documents import (
    DOCUMENTS,
    ROOT,
    Block,
    Reader,
    blocks,
    follow,
    in_code,
    prose,
    text_of,
)
from tests.support.rooms import MAY_IMPORT
from thimble_zarr.analysis.findings import (
    ALTERED_CHUNK,
    MISLABELLED_ROW,
    MORE_FAILURES,
)
from thimble_zarr.analysis.health.conditions import CONDITIONS
from thimble_zarr.causes.catalogue import CAUSES
from thimble_zarr.causes.cause import ROWS_NOT_KEPT
from thimble_zarr.cli.main import cli
from thimble_zarr.experiment.trainer import TrainingData
from thimble_zarr.optim import registry

OTHERS = [document for document in DOCUMENTS if document.name != "README.md"]
"""Those that are followed here; the README has a file of its own."""

NOT_RUN = [
    ("README.md", "it serves until Ctrl-C"),
    ("architecture.md", "an illustration"),
    ("format.md", "an illustration"),
    ("guide.md", "it serves until Ctrl-C"),
    *[("remote.md", "it needs a server")] * 4,
]
"""Blocks that are not run, and why. A new one must be added here."""


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


# What the trainers do with what they stand on, and say of a machine without a GPU.
@pytest.mark.filterwarnings("default:::pytorch_lightning", "default:.*LeafSpec")
@pytest.mark.filterwarnings("default:.*(pin_memory|num_workers|checkpoint)")
@pytest.mark.parametrize("document", OTHERS, ids=name_of)
def test_every_block_runs(
    document: Path,
    tmp_path: Path,
    default_data: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a page registers, other tests in this process do not have.
    monkeypatch.setattr(registry, "OTHERS", dict(registry.OTHERS))
    reader = follow(document, tmp_path, default_data)
    assert reader.ran == [block for block in blocks(text_of(document)) if block.not_run is None]
    if document.name == "guide.md":
        assert_recorded_what_it_says(tmp_path)


def assert_recorded_what_it_says(directory: Path) -> None:
    for name, n_steps in (("mine", 20), ("trainer", 5), ("lightning", 8), ("own", 15), ("run", 12)):
        ds = thimble_zarr.open_dataset(directory / f"{name}.zarr")
        assert ds.sizes["step"] == n_steps + 1
        assert int(thimble_zarr.accounting(ds).n_different.sum()) == 0
        assert not np.isnan(ds.loss[1:]).any()
    check = json.loads((directory / "the.json").read_text())
    assert check["tokens"] == {"subset": "text: the", "n": 1}
    assert check["holds"] is True
    assert len((directory / "table.csv").read_text().splitlines()) == 13
    for name in ("tokenizer.json", "mask.safetensors", "notebook.safetensors", "imported.zarr"):
        assert (directory / name).exists()


@every_document
def test_every_fence_is_of_a_block(document: Path) -> None:
    lines = [line for line in text_of(document).splitlines() if "```" in line or "~~~" in line]
    assert len(lines) == 2 * len(blocks(text_of(document)))
    assert all(line.startswith("```") for line in lines)
    assert "\n\n    " not in prose(text_of(document)), "code without a fence"


def test_what_is_not_run_is_known() -> None:
    assert [
        (document.name, block.not_run)
        for document in DOCUMENTS
        for block in blocks(text_of(document))
        if block.not_run is not None
    ] == NOT_RUN


@pytest.mark.parametrize(
    ("language", "content"),
    [
        ("", "anything\n"),
        ("bash", "thimble-zarr --help\n"),
        ("console", "thimble-zarr --help\n"),
        ("console", "$ thimble --help\n"),
        ("console", "$ thimble-zarr info nothing.zarr\n"),
        ("console", "$ thimble-zarr check --no-such-option\n"),
        ("console", "$ make nothing\n"),
        ("console", '$ .venv/bin/pip install "thimble-zarr[nothing]"\n'),
        ("console", "$ .venv/bin/pip install --editable .. \n"),
        ("console", "$ .venv/bin/python -m benchmarks --no-such-option\n"),
        ("console", "$ python3 -m venv venv\n"),
        ("python", "assert False\n"),
        ("text", "what nobody printed\n"),
        ("toml", "steps = 3\n"),
    ],
)
def test_what_is_wrong_in_a_block_is_seen(language: str, content: str) -> None:
    with pytest.raises((AssertionError, CalledProcessError)):
        Reader().follow(Block(language, content, 1))


def test_output_is_compared_but_for_numbers() -> None:
    reader = Reader()
    reader.follow(Block("python", "print('one 1.5')\nprint('two 2')\n", 1))
    reader.follow(Block("text", "one 7\n...\ntwo -3.2\n", 1))
    for wrong in ("one\n", "two 2\none 1.5\n", "one 1.5\none 1.5\n"):
        with pytest.raises(AssertionError, match="nothing like"):
            reader.follow(Block("text", wrong, 1))


def test_a_block_without_an_end_is_seen() -> None:
    with pytest.raises(AssertionError, match="line 2 does not end"):
        blocks("\n```python\n")


@every_document
def test_every_block_of_python_imports_what_it_uses(document: Path) -> None:
    contents = [block.content for block in blocks(text_of(document)) if block.language == "python"]
    trees = [ast.parse(content) for content in contents]
    imported = [
        {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for tree in trees
    ]
    everywhere = set().union(*imported)
    for tree, here in zip(trees, imported, strict=True):
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        assert used & everywhere <= here, ast.unparse(tree)
        assert not made & everywhere, ast.unparse(tree)


LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """Return where GitHub lets a link lead in a document."""
    titles = re.findall(r"^#+ (.+)$", prose(text_of(document)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(document: Path, text: str) -> list[str]:
    """Return the links of a text in a document that lead nowhere."""
    wrong = []
    for link in LINK.findall(prose(text)):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@every_document
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken(document, text_of(document)) == []


def test_a_broken_link_is_seen() -> None:
    text = "[a](nothing.md) [b](docs/guide.md#nothing) [c](#nothing) [d](docs/guide.md#check)"
    assert len(broken(ROOT / "README.md", text)) == 3


def test_every_document_is_found_from_the_readme() -> None:
    found, ahead = set(), [ROOT / "README.md"]
    while ahead:
        document = ahead.pop()
        found.add(document)
        links = [link.partition("#")[0] for link in LINK.findall(prose(text_of(document)))]
        linked = {(document.parent / link).resolve() for link in links if link.endswith(".md")}
        ahead += sorted(linked & set(DOCUMENTS) - found)
    assert found == set(DOCUMENTS)


NOT_OURS = {"--index-url", "--help", "--no-real"}
"""Options of other programs and of benchmarks, and the one that click makes."""


@every_document
def test_every_option_exists(document: Path) -> None:
    options = {
        flag
        for command in [cli, *cli.commands.values()]
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    named = {flag for code in in_code(document) for flag in re.findall(r"--[a-z][a-z0-9-]*", code)}
    assert named <= options | NOT_OURS


@every_document
def test_every_target_exists(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = {code.split()[1] for code in in_code(document) if code.startswith("make ")}
    assert named <= targets


@every_document
def test_every_file_exists(document: Path) -> None:
    named = {
        path
        for code in in_code(document)
        for path in re.findall(r"\b(?:thimble_zarr|tests|benchmarks|docs)/[\w./-]*\w", code)
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    tests = {code for code in in_code(document) if re.fullmatch(r"test_[a-z_]+", code)}
    assert tests <= {file.stem for file in (ROOT / "tests").rglob("test_*.py")}


def test_every_command_of_the_tool_is_in_the_table() -> None:
    table = table_of(ROOT / "docs/guide.md", "command")
    assert sorted(table) == sorted(cli.commands)


def test_every_finding_is_in_the_table() -> None:
    named = (MISLABELLED_ROW, ROWS_NOT_KEPT, ALTERED_CHUNK, MORE_FAILURES)
    codes = {cause.code for cause in (*CAUSES, *named)}
    assert set(table_of(ROOT / "docs/exactness.md", "finding")) == codes


def test_every_concern_is_in_the_table() -> None:
    codes = {condition.code for condition in CONDITIONS}
    assert set(table_of(ROOT / "docs/exactness.md", "concern")) == codes


def table_of(document: Path, title: str) -> list[str]:
    """Return what is in code in the first column of a table, whose first column has a title."""
    (table,) = re.findall(
        rf"^\| {title} \|.*?\n\n", text_of(document), flags=re.MULTILINE | re.DOTALL
    )
    cells = re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)
    return [code for cell in cells for code in re.findall(r"`([a-z-]+)`", cell)]


def test_the_numbers_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "benchmarks/results.json").read_text())
    measured = text_of(ROOT / "docs/benchmarks.md")
    assert markdown(results, EARLY_STEP, results["about"]["steps"]) in measured
    peers = json.loads((ROOT / "benchmarks/peers.json").read_text())
    assert report.summary(peers) in measured
    assert report.summary(peers[LARGER]) in measured


def test_the_planted_faults_are_the_counted_ones() -> None:
    results = json.loads((ROOT / "benchmarks/faults.json").read_text())
    page = text_of(ROOT / "docs/exactness.md")
    assert faults.summary(results) in " ".join(page.split())
    table, _, others = faults.markdown(results).partition("\n\n")
    assert table in page
    assert others.startswith("Of 100 flipped bits"), "a fault was called by another name"


def test_a_fault_that_is_called_otherwise_is_told() -> None:
    results = json.loads((ROOT / "benchmarks/faults.json").read_text())
    count = next(one for one in results["optimizers"]["SGD"]["float32"] if "torn" in one[0])
    count[1] = "unbalanced"
    assert "- SGD, float32: torn row (torn-row) was called unbalanced (1)" in faults.markdown(
        results
    )
    assert faults.summary(results).startswith("654 of 655")


def test_the_picture_of_the_imports_is_the_tested_one() -> None:
    page = text_of(ROOT / "docs/architecture.md").split("## Who may import whom")[1]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, flags=re.MULTILINE)
    shown = {package: set(re.findall(r"`(\w+)`", others)) for package, others in rows}
    assert shown == {name: may for name, may in MAY_IMPORT.items() if name != "__main__"}
