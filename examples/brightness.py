"""Condition pictures on how bright they are: a plug-in, which changes no file of labelgrid.

    python examples/brightness.py measure data/train               # writes data/train/brightness.json
    python examples/brightness.py train denoiser --data data/train --name lit --minutes 30
    python examples/brightness.py draw lit picture.png "red cube" --brightness 0.2 0.4 0.6

`register` is all that it takes. The trainer then reads brightness.json, the network embeds the number beside the labels
and learns some pictures without it, the checkpoint names it, and `new_row` takes it. All commands of the trainer work,
as long as this file starts them. A service with such a model has to import this module, too; without it, it refuses the
checkpoint and says why.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import ImageStat

from shared.diffusion.denoise import finish
from shared.diffusion.inputs import PictureInput, register
from shared.diffusion.model import load_denoiser
from shared.pictures import grid, png_bytes
from shared.registry import resolve
from shared.vocabulary import Vocabulary, read_train_file
from trainer.__main__ import main as trainer
from trainer.data_folder import pictures_folder, read_picture

register("brightness", PictureInput(numbers=1))


def measure(folder: Path) -> None:
    """Write the mean lightness of each picture, from 0 to 1."""
    names = list(read_train_file(folder / "train.json", Vocabulary.from_objects_file(folder / "objects.json")))
    pictures = pictures_folder(folder, names[0])
    found = {name: ImageStat.Stat(read_picture(pictures / name).convert("L")).mean[0] / 255 for name in names}
    (folder / "brightness.json").write_text(json.dumps(found))


def draw(storage: Path, name: str, file: Path, labels: list[str], brightness: list[float]) -> None:
    """Draw the same noise once for each brightness, side by side."""
    denoiser = load_denoiser(resolve(storage, name, "denoiser"))
    stepper, wanted = denoiser.stepper(), denoiser.vocabulary.multi_hot(labels)
    rows = [stepper.new_row(wanted, denoiser.options, 7, inputs={"brightness": [one]}) for one in brightness]
    file.write_bytes(png_bytes(grid(finish(stepper, rows))))


def main() -> int:
    if sys.argv[1:2] not in (["measure"], ["draw"]):
        return trainer()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("measure").add_argument("folder", type=Path)
    drawing = commands.add_parser("draw")
    drawing.add_argument("name")
    drawing.add_argument("picture", type=Path)
    drawing.add_argument("labels", nargs="+")
    drawing.add_argument("--brightness", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    drawing.add_argument("--storage", type=Path, default=Path("models"))
    asked = parser.parse_args()
    if asked.command == "measure":
        measure(asked.folder)
    else:
        draw(asked.storage, asked.name, asked.picture, asked.labels, asked.brightness)
    return 0


if __name__ == "__main__":
    sys.exit(main())
