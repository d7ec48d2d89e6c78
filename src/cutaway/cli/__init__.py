"""The command line: ``cutaway METHOD MODEL --prompt ...``. Standard output carries results, nothing else does."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from cutaway.core.errors import CutawayError

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells count
TRACEBACK = "--traceback"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line; errors are one sentence on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    try:
        return _run(words or ["--help"])
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the last line before the user: every error becomes a sentence
        if wants_traceback:
            traceback.print_exc()
        if isinstance(error, CutawayError):
            return _failed(str(error), error.exit_code)
        hint = "" if wants_traceback else f"; run with {TRACEBACK} to see where"
        return _failed(f"{type(error).__name__}: {error}{hint}", UNEXPECTED)


def _run(words: list[str]) -> int:
    from typer import Abort
    from typer.exceptions import TyperException
    from typer.main import get_command

    from cutaway.cli.app import app

    try:
        code = get_command(app(words)).main(words, prog_name="cutaway", standalone_mode=False)
    except TyperException as error:  # words that no command understands
        return _failed(error.format_message(), error.exit_code)
    except Abort:
        return _failed("interrupted", INTERRUPTED)
    if code == INTERRUPTED:  # Typer turns Ctrl-C into this code and says nothing
        return _failed("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _failed(message: str, code: int) -> int:
    from cutaway.cli.output import complain

    complain(" ".join(message.split()))
    return code
