"""Documents in Markdown, followed as a reader would: every command and all code, in order.

Each fenced block has a language, which says what is done with it: `console` has commands, `python`
code, `text` what the block before it printed, and `toml` a file, whose name its first line has. A
block that cannot be run has a comment before it that says why: `<!-- not run: why -->`.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import click
import pytest
from click.testing import CliRunner

from thimble_zarr.cli.main import cli
from thimble_zarr.cli.train import DEMO
from thimble_zarr.experiment import trainer
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import TrainingData, load_data
from thimble_zarr.report.panels.registry import PANELS

ROOT = Path(__file__).parents[2]

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its content, the line it begins at, and why it is not run."""

    language: str
    content: str
    line: int
    not_run: str | None = None

    @property
    def commands(self) -> list[str]:
        """The commands of a block of them, and nothing else may be in it."""
        lines = self.content.splitlines()
        assert all(line.startswith("$ ") for line in lines), f"line {self.line}: not a command"
        return [line.removeprefix("$ ") for line in lines]


def blocks(document: str) -> list[Block]:
    """Return every fenced block of a document."""
    found: list[Block] = []
    fence: tuple[str, int, str | None] | None = None
    content: list[str] = []
    before = ""
    for number, line in enumerate(document.splitlines(), 1):
        if fence is None and line.lstrip().startswith(("```", "~~~")):
            reason = _NOT_RUN.fullmatch(before)
            fence, content = (line.removeprefix("```"), number, reason and reason[1]), []
        elif fence is not None and line == "```":
            language, start, why = fence
            found.append(Block(language, "".join(f"{one}\n" for one in content), start, why))
            fence = None
        elif fence is not None:
            content.append(line)
        before = line
    assert fence is None, f"the block that begins at line {fence[1]} does not end"
    return found


def prose(document: str) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)


def recipe(*targets: str) -> list[str]:
    """Return the commands that make would run."""
    shown = subprocess.run(
        ["make", "--always-make", "--dry-run", "--no-print-directory", *targets],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "MAKE" not in name},
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout.replace("\\\n", " ").splitlines()


DEMO_STEPS = 23
"""As long a table as of 150 steps, whose first and last are shown, in a sixth of the time."""

N_PANELS = 2
"""Of a report. All of them, at that size, are in `cli/test_demo` and in `browser/`."""


class Reader:
    """Follows a document in the current directory.

    Attributes
    ----------
    ran
        The blocks it followed.
    printed
        What the last of them that printed anything printed.
    """

    def __init__(self) -> None:
        self.ran: list[Block] = []
        self.printed = ""
        self._names: dict[str, object] = {}

    def follow(self, block: Block) -> None:
        known: Mapping[str, Callable[[Block], None]] = {
            "console": self._console,
            "python": self._python,
            "text": self._text,
            "toml": self._toml,
        }
        assert block.language in known, f"line {block.line}: the language {block.language!r}"
        known[block.language](block)
        self.ran.append(block)

    def _console(self, block: Block) -> None:
        self.printed = ""
        for line in block.commands:
            command, _, exit_code = line.partition("  # exits with ")
            program, *arguments = shlex.split(command)
            if program.removeprefix(".venv/bin/") == "thimble-zarr":
                self.printed += _tool(arguments, int(exit_code or 0))
            else:
                assert program in OTHERS, f"line {block.line}: the command {program}"
                assert not exit_code
                self.printed += OTHERS[program](arguments)

    def _python(self, block: Block) -> None:
        printed = io.StringIO()
        code = compile("\n" * block.line + block.content, "document", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, self._names)
        self.printed = printed.getvalue()

    def _text(self, block: Block) -> None:
        """Find each line in what was printed, in that order, whatever the numbers are."""
        printed = iter(self.printed.splitlines())
        for line in block.content.splitlines():
            if line and line != "...":
                assert any(shape(line) == shape(other) for other in printed), (
                    f"line {block.line}: nothing like {line!r} is in\n{self.printed}"
                )

    def _toml(self, block: Block) -> None:
        name = block.content.splitlines()[0].removeprefix("# ")
        assert Path(name).suffix == ".toml", f"line {block.line}: it has no name"
        tomllib.loads(block.content)
        Path(name).write_text(block.content, encoding="utf-8")


def shape(line: str) -> str:
    """Return a line without what differs between runs: numbers, and where the cosine is least.

    And what replays, which depends on what is installed.
    """
    line = re.sub(r"replayed by [^,]+,", "replayed by #,", line)
    return re.sub(r"[-\s\d.,]+", " # ", line.split("; cosine")[0])


def _tool(arguments: list[str], exit_code: int = 0) -> str:
    if arguments[0] == "demo" and not any(one.startswith("--steps") for one in arguments):
        arguments = [*arguments, "--steps=2"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    shown = f"thimble-zarr {shlex.join(arguments)}\n{result.output}"
    assert result.exit_code == exit_code, shown
    return result.stdout


def _make(arguments: list[str]) -> str:
    """Run what `make demo` runs of this package; of other targets there must be a recipe."""
    commands = recipe(*arguments)
    assert commands
    if arguments != ["demo"]:
        return ""
    program, *rest = shlex.split(commands[-1])
    assert program == ".venv/bin/thimble-zarr"
    return _tool([*rest, f"--steps={DEMO_STEPS}"])


def _pip(arguments: list[str]) -> str:
    """Compare what would be installed with what make installs, or with the extras there are."""
    install, *rest = arguments
    assert install == "install"
    if extras := re.fullmatch(r"thimble-zarr\[(.+)\]", rest[-1]):
        metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        known = metadata["project"]["optional-dependencies"]
        assert all(extra in known for extra in extras[1].split(",")), rest
        return ""
    made = [set(line.split()) for line in recipe("demo") if " -m pip install " in line]
    assert any(set(rest) <= words for words in made), rest
    return ""


def _module(arguments: list[str]) -> str:
    """Have a module with a command line read its arguments; it is not run, which takes hours."""
    flag, name, *rest = arguments
    assert flag == "-m"
    if name == "pytest":
        assert all((ROOT / one).exists() for one in rest if not one.startswith("-"))
        return ""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for library in ("h5py", "matplotlib"):  # only those who measure have them
            if find_spec(library) is None:
                monkeypatch.setitem(sys.modules, library, MagicMock())
        is_package = (ROOT / name.replace(".", "/")).is_dir()
        module = import_module(f"{name}.__main__" if is_package else name)
    try:
        module.main.make_context(name, rest)
    except click.UsageError as error:
        raise AssertionError(f"python -m {name}: {error.format_message()}") from error
    return ""


def _python3(arguments: list[str]) -> str:
    assert arguments == ["-m", "venv", ".venv"]
    return ""


OTHERS: Mapping[str, Callable[[list[str]], str]] = {
    ".venv/bin/pip": _pip,
    ".venv/bin/python": _module,
    "make": _make,
    "python3": _python3,
}
"""Other programs than this package's, and what is done where they would be run."""

FROM = ("corpus", "tokenizer", "token_mask", "vocab_size")
"""Settings that say what is trained on."""


def follow(document: Path, directory: Path, data: TrainingData) -> Reader:
    """Follow a document in a directory, with the default corpus encoded once and small demos."""

    def load(config: TrainingConfig) -> TrainingData:
        defaults = TrainingConfig()
        same = all(getattr(config, name) == getattr(defaults, name) for name in FROM)
        return data if same else load_data(config)

    reader = Reader()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(directory)
        monkeypatch.setattr(trainer, "load_data", load)
        monkeypatch.setattr("thimble_zarr.cli.train.DEMO", replace(DEMO, batch_size=4))
        monkeypatch.setattr("thimble_zarr.report.html.PANELS", PANELS[:N_PANELS])
        (directory / "README.md").write_bytes((ROOT / "README.md").read_bytes())
        for block in blocks(document.read_text(encoding="utf-8")):
            if block.not_run is None:
                reader.follow(block)
    return reader


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def in_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text_of(document)))
