"""What could not be published or written, or would replace what must stay, is refused before the work."""

from pathlib import Path

import pytest

from tests.toy_checkpoint import publish_toys
from tests.trainer.command_line import Command, refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "denoiser", "--name", "toy-evaluator"], "toy-evaluator: exists and is of kind evaluator; choose an"),
        (["train", "evaluator", "--held-out", "data", "--name", "toy"], "toy: exists and is of kind denoiser"),
        (["train", "denoiser", "--storage", "file"], "error: --storage file: file is a file, not a folder"),
        (["train", "distilled", "--teacher", "toy", "--run", "file"], "error: --run file: file is a file"),
        (["train", "upsampler", "--base", "toy", "--name", "toy"], "toy: is the checkpoint that the new one changes"),
        (["train", "denoiser", "--patience", "2"], "--patience needs --held-out"),
        (["train", "distilled", "--teacher", "toy", "--patience", "2"], "--patience is for objectives with a held-out"),
    ],
)
def test_what_could_not_be_published_is_not_trained(
    command: Command, data: Path, arguments: list[str], message: str
) -> None:
    publish_toys(Path("models"))
    Path("file").touch()
    kept = {path: path.read_bytes() for path in Path("models").iterdir()}
    refused(command(*arguments, "--data", data, "--steps", 1), message)
    assert {path: path.read_bytes() for path in Path("models").iterdir()} == kept
    assert not Path("runs").exists()
