"""The pictures of data set folders at their own size. Each is read when it is used, to save memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.vocabulary import Vocabulary, read_train_file
from trainer.data import pictures_folder, read_picture
from trainer.errors import TrainerError

SIZE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})")


class Pictures:
    """Pictures at full size, read when they are used."""

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
    paths = [path for folder in folders for path in _paths(folder)]
    if size is None:
        return Pictures(paths, read_picture(paths[0]).size)
    if not (sides := SIZE.fullmatch(size)):
        raise TrainerError(f'--size "{size}" is not of the form 320x240')
    return Pictures(paths, (int(sides[1]), int(sides[2])))


def _paths(folder: Path) -> list[Path]:
    names = list(read_train_file(folder / "train.json", Vocabulary.from_objects_file(folder / "objects.json")))
    if not names:
        raise TrainerError(f"{folder / 'train.json'} names no pictures")
    within = pictures_folder(folder, names[0])
    return [within / name for name in names]


def as_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
