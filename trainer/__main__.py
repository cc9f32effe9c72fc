"""`python -m trainer COMMAND`: assembles the commands and reports their errors."""

from __future__ import annotations

import io
import sys
from typing import Any

import typer
from pydantic import ValidationError

from shared.checkpoint import CheckpointError
from shared.vocabulary import LabelError
from trainer.commands import checkpoints, data, measures, studies, training
from trainer.commands.terminal import console, plain
from trainer.errors import TrainerError

INTERRUPTED = 130  # Typer's exit code for Ctrl-C
UsageError: type[Any] = typer.BadParameter.__bases__[0]  # Typer does not export it

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Render data, train, distil and upsample a denoiser, fit an evaluator, and score what they made.",
)
for command in (
    data.render, data.locate,
    training.fit_evaluator, training.train, training.fit_layouts, training.distill, training.upsample,
    checkpoints.score, checkpoints.promote, checkpoints.set_sampling, checkpoints.set_support,
    checkpoints.export, checkpoints.move_upsampler, checkpoints.card,
    studies.compare, studies.calibrate, studies.memorisation, studies.spectrum, studies.two_sample,
    studies.limit,
    measures.arrangements, measures.places, measures.coverage,
):  # fmt: skip
    app.command()(command)
app.command("import")(data.import_data)  # Python keeps the name for itself


def main() -> int:
    """Run a command. An error is one line on stderr and exit code 1, or 2 for wrong usage."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # labels that the terminal's encoding lacks, as on stderr
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
    except (TrainerError, LabelError, CheckpointError, OSError, FloatingPointError) as error:
        _complain(str(error))
    return 1


def _complain(message: str) -> None:
    line = plain(f"error: {' '.join(message.split())}")
    console.print(line, style="red", markup=False, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
