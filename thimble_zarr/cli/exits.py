"""Exit codes: the worse, the higher."""

FOUND, USAGE, UNREADABLE, INTERRUPTED = 1, 2, 3, 130


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    about_usage = isinstance(error, ValueError | TypeError | FileExistsError)
    return USAGE if about_usage else UNREADABLE
