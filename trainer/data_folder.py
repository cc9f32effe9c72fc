"""The files of a data set folder: its pictures are read, its label files written. Imports no torch."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from shared import storage as files
from shared.rgb import check_depth, to_rgb
from shared.vocabulary import Vocabulary, read_train_file
from trainer.errors import TrainerError

SIZE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})")


def write_label_file(path: Path, content: object) -> None:
    files.write(path, json.dumps(content).encode())


def read_picture(path: Path, content: bytes | None = None) -> Image.Image:
    """Read a picture as a viewer shows it, as RGB: rotated as the file's EXIF says. TrainerError if it is none.

    `content`: of the file, where `path` is only a name.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as picture:
            check_depth(picture)  # before `exif_transpose` decodes it
            return to_rgb(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainerError(f"{path}: cannot be read as a picture ({error})") from error


def pictures_folder(folder: Path, name: str) -> Path:
    """Return the folder of a data set's pictures, one of which is `name`: `folder` or one in it.

    Raises TrainerError if it is not found.
    """
    if (folder / name).is_file():
        return folder
    for sub in sorted(one for one in folder.iterdir() if one.is_dir()):
        if (sub / name).is_file():
            return sub
    raise TrainerError(f'{folder}: picture "{name}" is neither in it nor in a folder in it')


class Pictures:
    """Pictures at full size, read when they are used, to save memory."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths, self.size = paths, size

    def read(self, i: int) -> Image.Image:
        """Return picture i as RGB, scaled to `size` (width, height) if it has another."""
        picture = read_picture(self.paths[i])
        return picture if picture.size == self.size else picture.resize(self.size, Image.Resampling.BILINEAR)


def find_pictures(folders: Sequence[Path], size: str | None) -> Pictures:
    """Return the pictures that the folders' train.json name, at `size` ("320x240") or the size of the first.

    Raises TrainerError for a bad size, and if a folder's first picture is not found or the very first cannot be read.
    """
    paths = list[Path]()
    for folder in folders:
        names = list(read_train_file(folder / "train.json", Vocabulary.from_objects_file(folder / "objects.json")))
        if not names:
            raise TrainerError(f"{folder / 'train.json'} names no pictures")
        within = pictures_folder(folder, names[0])
        paths += [within / name for name in names]
    if size is None:
        return Pictures(paths, read_picture(paths[0]).size)
    if not (sides := SIZE.fullmatch(size)):
        raise TrainerError(f'--size "{size}" is not of the form 320x240')
    return Pictures(paths, (int(sides[1]), int(sides[2])))
