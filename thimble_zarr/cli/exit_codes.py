"""Exit codes: the worse, the higher."""

FOUND, USAGE, UNREADABLE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    return USAGE if isinstance(error, ValueError | TypeError | FileExistsError) else UNREADABLE
