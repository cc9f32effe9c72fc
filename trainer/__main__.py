"""`python -m trainer COMMAND`: assembles the commands and reports their errors."""

from __future__ import annotations

import io
import sys
from typing import Any

import typer
from pydantic import ValidationError

from shared.checkpoint import CheckpointError
from shared.vocabulary import LabelError
from trainer.commands import checkpoints, data, evaluating, training
from trainer.commands.terminal import console, plain
from trainer.errors import StoppedError, TrainerError
from trainer.former import replaced
from trainer.plugins import plugins

INTERRUPTED = 130  # Typer's exit code for Ctrl-C
UsageError: type[Any] = typer.BadParameter.__bases__[0]  # Typer does not export it

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Render or import data, train on it, and score, study and publish what was trained.",
)
app.command("import")(data.import_data)  # Python keeps the name for itself
for name, added in plugins().commands.items():
    app.command(name)(added)
app.add_typer(training.app, name="train")
for command in (
    evaluating.score, evaluating.evaluate, evaluating.compare,
    checkpoints.configure, checkpoints.promote, checkpoints.export, checkpoints.card,
):  # fmt: skip
    app.command()(command)


def main() -> int:
    """Run a command. An error is one line on stderr and exit code 1, or 2 for wrong usage."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # labels that the terminal's encoding lacks, as on stderr
    if problem := replaced(sys.argv[1:]):
        _complain(problem)
        return 2
    try:
        code = int(app(standalone_mode=False) or 0)
        if code == INTERRUPTED:
            _complain("interrupted")
        return code
    except UsageError as error:
        _complain(f"{error.format_message()} See --help.")
        return 2
    except ValidationError as error:
        first = error.errors()[0]
        field, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        _complain(f"{field}: {message}, got {first['input']!r}" if field else message)
    except StoppedError as stopped:
        _complain(str(stopped))
        return 128 + stopped.number  # a shell's code of a process that a signal has ended
    except (TrainerError, LabelError, CheckpointError, OSError, FloatingPointError) as error:
        _complain(str(error))
    return 1


def _complain(message: str) -> None:
    line = plain(f"error: {' '.join(message.split())}")
    console.print(line, style="red", markup=False, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
