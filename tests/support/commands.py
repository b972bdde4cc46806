"""Commands, run in this process, and what they print."""

import json
import re
from pathlib import Path

from click.testing import CliRunner, Result

from thimble_zarr.cli.main import cli

N_VOCABULARY = 300
"""Tokens of the tokenizer that tests of commands share."""

START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


MAIN = "from thimble_zarr.cli.main import main; main()"


def run(*args: object) -> Result:
    """Run the command line; an exception that would be shown as a traceback fails the test."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def outcome(*args: object) -> tuple[int, str, str]:
    """Return the exit code of a command, and what it prints to stdout and to stderr."""
    result = run(*args)
    return result.exit_code, result.stdout, result.stderr


def succeeds(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result


def told(stderr: str) -> list[str]:
    """Return the lines of stderr, but for those that say what is being done, and how far it is."""
    progress = re.compile(r".* \.\.\.|(training|checking): .*")
    return [line for line in stderr.splitlines() if not progress.fullmatch(line)]


def fails(exit_code: int, *args: object) -> str:
    """Expect an exit code and an error of one line, and return that line."""
    result = run(*args)
    assert result.exit_code == exit_code, result.output
    lines = told(result.stderr)
    if lines[0].startswith("Usage: "):  # click says where help is, too
        lines = lines[3:]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def strict_json(text: str) -> dict:
    """Read JSON as RFC 8259 has it, which knows no NaN and no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def checked(store: Path, *args: object, exit_code: int = 0) -> dict:
    result = run("check", store, "--format", "json", *args)
    assert result.exit_code == exit_code, result.output
    return strict_json(result.stdout)


def info_of(store: Path) -> dict:
    return strict_json(succeeds("info", store, "--format", "json").stdout)


def check(*args: object, exit_code: int = 0) -> Result:
    result = run("check", *args)
    assert result.exit_code == exit_code, result.output
    return result
