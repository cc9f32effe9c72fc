"""Runs the example of docs/own-data.md on 2,000 pictures of each kind that people have: `make own-data-test`.

The commands are the page's, from `trainer import` to the picture that a service draws. Only source, folders, label and
minutes are replaced: the page's are of emoji, and take an hour. MINUTES of each training is 1; with 5 all takes half an
hour. What the trainer prints of each model is shown with `-s`.
"""

import io
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageDraw

from deploy.pages_test import blocks
from service.local.demo import free_port
from service.local.redis_server import die_with_parent
from tests.service.processes import until

ROOT = Path(__file__).parents[1]
MINUTES = os.environ.get("MINUTES", "1")
PICTURES = 2000
COLOURS, SHAPES = ("red", "green", "blue", "gold"), ("disc", "square", "bar")


def drawn(number: int) -> tuple[str, str, Image.Image]:
    """Return a colour, a shape, and a picture of it somewhere on a dark ground."""
    rng = random.Random(number)
    colour, shape, side = rng.choice(COLOURS), rng.choice(SHAPES), rng.randint(18, 30)
    x, y = (rng.randint(2, 62 - side) for _ in range(2))
    picture = Image.new("RGB", (64, 64), (rng.randint(0, 40),) * 3)
    draw, box = ImageDraw.Draw(picture), (x, y, x + side, y + side // (3 if shape == "bar" else 1))
    (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=colour)
    return colour, shape, picture


def folder_of_classes(source: Path) -> str:
    for i in range(PICTURES):
        colour, shape, picture = drawn(i)
        (source / f"{colour} {shape}").mkdir(parents=True, exist_ok=True)
        picture.save(source / f"{colour} {shape}" / f"{i}.png")
    return "red disc"


def folder_of_captions(source: Path) -> str:
    source.mkdir()
    for i in range(PICTURES):
        colour, shape, picture = drawn(i)
        picture.save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"{colour}, {shape}\n")
    return "red, disc"


def parquet_file(source: Path) -> str:
    rows = []
    for i in range(PICTURES):
        colour, shape, picture = drawn(i)
        picture.save(content := io.BytesIO(), "PNG")
        rows.append({"image": {"bytes": content.getvalue(), "path": None}, "labels": [colour, shape]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    return "red, disc"


def commands(source: Path, folder: Path, labels: str) -> tuple[str, str, str]:
    """Return the page's commands for these pictures: those that train, the one that serves, and the one that draws."""
    example = blocks("docs/own-data.md")[0].text.replace("\\\n", " ")
    changes = {
        r"^make .*|^python examples/.*": ":",
        r"import emoji emoji-data": f"import {shlex.quote(str(source))} emoji-data",
        r" --held-out-files \S+": "",
        r"--minutes \d+": f"--minutes {MINUTES}",
        r"^python ": f"{shlex.quote(sys.executable)} ",
        r"^labelgrid ": f"{shlex.quote(sys.executable)} -m labelgrid ",
        r'"medium skin, man, surfing"': shlex.quote(labels),
        r"emoji-data|mymodels|runs/": rf"{folder}/\g<0>",
        r"surfing\.png": str(folder / "drawn.png"),
    }
    for pattern, instead in changes.items():
        assert re.search(pattern, example, re.MULTILINE), f"{pattern} is not in the page any more"
        example = re.sub(pattern, instead, example, flags=re.MULTILINE)
    serving = re.search(r"^.* serve\b.*$", example, re.MULTILINE)
    assert serving is not None
    return example[: serving.start()], serving[0], example[serving.end() :]


@pytest.mark.parametrize(
    ("write", "name"), [(folder_of_classes, "classes"), (folder_of_captions, "captions"), (parquet_file, "all.parquet")]
)
def test_they_are_imported_trained_and_served(write: Callable[[Path], str], name: str, tmp_path: Path) -> None:
    source, port = tmp_path / name, free_port()
    training, serving, drawing = commands(source, tmp_path, write(source))
    environment = {**os.environ, "LABELGRID_STORAGE": str(tmp_path / "mymodels"), "LABELGRID_PORT": str(port)}
    environment["LABELGRID_URL"] = f"http://127.0.0.1:{port}"

    def shell(script: str) -> None:
        done = subprocess.run(["sh", "-ec", script], cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, script

    shell(training)
    pictures = (tmp_path / "emoji-data" / "train" / "images").rglob("*")
    assert sum(path.is_file() for path in pictures) == 0.9 * PICTURES
    log = tmp_path / "serve.log"
    with (
        log.open("w") as lines,
        subprocess.Popen(
            ["sh", "-c", f"exec {serving.partition('#')[0]} --port {port}"], cwd=ROOT, env=environment,
            stdout=lines, stderr=lines, preexec_fn=die_with_parent,
        ) as server,
    ):  # fmt: skip
        try:
            until(lambda: "is ready" in log.read_text() or server.poll() is not None, timeout_s=600.0)
            assert server.poll() is None, log.read_text()
            shell(drawing)
        finally:
            server.terminate()
    with Image.open(tmp_path / "drawn.png") as picture:
        assert min(picture.size) >= 64
