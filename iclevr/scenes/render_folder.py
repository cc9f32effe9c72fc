"""Renders scenes into a data set folder: iclevr/CLEVR_train_NNNNNN_K.png and the label files.

positions.json says where each picture's objects are, rotations.json how they are turned, in the order of its labels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iclevr.labels import ICLEVR
from iclevr.scenes.render import LAMP_POSITIONS, jittered_lamps, render, squeeze, visible_pixels
from iclevr.scenes.scene import SceneObject, picture_position, place
from trainer.data_folder import write_label_file
from trainer.errors import TrainerError

VISIBLE_PIXELS = 200  # of each object, at least, in 320x240
BATCH = 64  # scenes rendered together: enough for all cores, few enough for a moving bar
TRIES = 10_000  # random scenes in a row that may be excluded
NAME = re.compile(r"CLEVR_train_(\d{6})_(\d)\.png")
Scenes = dict[str, list[str]]  # a scene's number, six digits -> its labels, in order of appearance


def random_scenes(count: int, max_objects: int, seed: int, without: Iterable[Sequence[str]] = ()) -> Scenes:
    """Draw `count` scenes of `max_objects` distinct labels each.

    A scene is rendered with its first object, its first two, and so on; none of these sets is in `without`. Raises
    TrainerError if no such scene is found.
    """
    rng, excluded = np.random.default_rng([seed, 0]), {frozenset(labels) for labels in without}
    scenes: Scenes = {}
    misses = 0  # in a row
    while len(scenes) < count:
        labels = [ICLEVR.names[i] for i in rng.permutation(len(ICLEVR))[:max_objects]]
        if not any(frozenset(labels[:n]) in excluded for n in range(1, max_objects + 1)):
            scenes[f"{len(scenes):06d}"] = labels
            misses = 0
        elif (misses := misses + 1) == TRIES:
            what = f"in {TRIES} scenes of {max_objects} objects, each had a set"
            raise TrainerError(f"{what} that --without excludes; take sets of fewer objects out of that file")
    return scenes


def scenes_of(train: dict[str, list[str]]) -> Scenes:
    """Return a train.json's scenes, in the file's order: the labels of each one's largest picture."""
    scenes: dict[str, list[list[str]]] = {}
    for name, labels in train.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise TrainerError(f'picture "{name}" is not named CLEVR_train_NNNNNN_K.png')
        scenes.setdefault(match[1], []).append(labels)
    for number, lists in scenes.items():
        lists.sort(key=len)
        for shorter, longer in itertools.pairwise(lists):
            if longer[: len(shorter)] != shorter:
                raise TrainerError(f"scene {number}: {longer} does not extend {shorter}")
    return {number: lists[-1] for number, lists in scenes.items()}


def scene_objects(labels: list[str], rng: np.random.Generator, *, centre: bool) -> list[SceneObject]:
    """Place the objects of i-CLEVR labels, the first in the centre if `centre`.

    Each must be seen: as in CLEVR (Johnson et al. 2017), a scene in which objects hide one is drawn again.
    """
    names = [(color, shape) for color, shape in (label.split() for label in labels)]
    while True:
        scene = place(names, rng, centre=centre)
        if min(visible_pixels(scene)) >= VISIBLE_PIXELS:
            return scene


def _save(path: Path, picture: NDArray[np.uint8]) -> None:
    Image.fromarray(picture).save(path, compress_level=1)


def write_folder(
    out: Path, scenes: Scenes, *, seed: int, size: int | None, centre: float = 1.0, jitter: bool = True,
    pictures: bool = True, advance: Callable[[int], None] = lambda _: None,
) -> int:  # fmt: skip
    """Render every scene into `out`: with one object, then two, up to all of its labels. Return the number of pictures.

    `centre`: the share of scenes whose first object stands in the picture's centre. `jitter`: whether each scene has
    its lamps moved, as CLEVR does. Without `pictures` only the JSON files are written.

    `size` None writes 320x240 with 4 rays a pixel; a number writes squares, squeezed from one ray a pixel: much faster.
    The same arguments give the same bytes.
    """
    folder = out / "iclevr"
    (folder if pictures else out).mkdir(parents=True, exist_ok=True)
    train: dict[str, list[str]] = {}
    positions: dict[str, list[tuple[float, float]]] = {}
    rotations: dict[str, list[float | None]] = {}
    numbered = enumerate(scenes.items())
    with ThreadPoolExecutor(2) as pool:
        while batch := list(itertools.islice(numbered, BATCH)):
            paths, objects, lamps = [], [], []
            for position, (number, labels) in batch:
                rng = np.random.default_rng([seed, 1, position])
                placed = scene_objects(labels, rng, centre=rng.random() < centre)
                lit = jittered_lamps(rng) if jitter else LAMP_POSITIONS
                points = [(round(x, 4), round(y, 4)) for x, y in map(picture_position, placed)]
                turns = [None if (turn := one.seen_rotation()) is None else round(turn, 4) for one in placed]
                for n in range(1, len(placed) + 1):
                    name = f"CLEVR_train_{number}_{n - 1}.png"
                    train[name], positions[name], rotations[name] = labels[:n], points[:n], turns[:n]
                    paths.append(folder / name)
                    objects.append(placed[:n])
                    lamps.append(lit)
            if pictures:
                rendered = render(objects, samples=2 if size is None else 1, lamps=np.array(lamps))
                list(pool.map(_save, paths, rendered if size is None else squeeze(rendered, size)))
            advance(len(paths))
    write_label_file(out / "objects.json", {name: i for i, name in enumerate(ICLEVR.names)})
    write_label_file(out / "positions.json", positions)
    write_label_file(out / "rotations.json", rotations)
    # two test files of 32 lists: one of one to three labels, one of all labels of a scene
    chosen = list(scenes.values())
    order = np.random.default_rng([seed, 2]).permutation(len(chosen))
    chosen = [chosen[i] for i in np.resize(order, 64)]  # repeated where there are fewer
    write_label_file(out / "test.json", [labels[: 1 + i % len(labels)] for i, labels in enumerate(chosen[:32])])
    write_label_file(out / "new_test.json", chosen[32:])
    write_label_file(out / "train.json", train)  # last, since a folder with a train.json counts as complete
    return len(train)
