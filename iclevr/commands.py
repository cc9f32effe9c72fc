"""The command that makes stand-in pictures: `trainer render`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iclevr.labels import ICLEVR
from shared.vocabulary import read_test_file, read_train_file
from trainer.commands import options, terminal
from trainer.errors import TrainerError


def render(
    out: Annotated[Path, typer.Argument(help="Folder to write; it is created if it does not exist.")],
    train: Annotated[Path | None, typer.Option(exists=True, help="A train.json whose label sets are rendered.")] = None,
    scenes: Annotated[
        int | None, typer.Option(min=1, help="Number of random scenes, without --train (default: 6003).")
    ] = None,
    objects: Annotated[int, typer.Option(min=1, max=10, help="Objects in a random scene's last picture.")] = 3,
    without: Annotated[
        Path | None, typer.Option(exists=True, help="A test file; no random scene shows one of its label sets.")
    ] = None,
    centre: options.Centre = 1.0,
    jitter: Annotated[bool, typer.Option(help="Move the lamps from scene to scene, as CLEVR does.")] = True,
    size: Annotated[
        int | None, typer.Option(min=8, max=512, help="Write squares of this side instead of 320x240; faster.")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Without: only labels and positions, for `train layouts`.")] = True,
    seed: options.Seed = 0,
) -> None:
    """Render stand-in pictures in the data set's own layout. The same seed gives the same bytes."""
    from iclevr.scenes.render_folder import random_scenes, scenes_of, write_folder

    if train and scenes:
        raise TrainerError("--scenes and --train exclude each other: a train.json already lists the scenes")
    if train and without:
        raise TrainerError("--without is for random scenes; with --train, remove the scenes from the train.json")
    if (out / "train.json").exists():
        raise TrainerError(f"{out} already holds a data set; choose another folder or remove it")
    if train:
        lists = scenes_of(read_train_file(train, ICLEVR))
    else:
        excluded = read_test_file(without, ICLEVR) if without else []
        lists = random_scenes(scenes or 6003, objects, seed, excluded)
    with terminal.bar() as progress:
        task = progress.add_task("rendering", total=sum(map(len, lists.values())))
        count = write_folder(
            out, lists, seed=seed, size=size, centre=centre, jitter=jitter, pictures=pictures,
            advance=lambda n: progress.advance(task, n),
        )  # fmt: skip
    terminal.show("rendered", [("pictures", str(count)), ("scenes", str(len(lists))), ("folder", str(out))])
