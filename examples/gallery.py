"""Draw a gallery: a page in Markdown with pictures of each model, and their labels when the pointer is on one.

    make serve                                        # in another terminal
    python examples/gallery.py docs/gallery/README.md # writes the page, and the pictures beside it

The service is at LABELGRID_URL, by default on this machine. Each picture carries its recipe.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path

from labelgrid import Client, Point

COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
CUBES, SPHERES, CYLINDERS = ([f"{colour} {shape}" for colour in COLOURS] for shape in ("cube", "sphere", "cylinder"))
SEED = 7


@dataclass(frozen=True)
class Part:
    """A part of the page: what its pictures are, and what is asked for."""

    name: str
    text: str
    model: str
    labels: list[list[str]]
    layouts: list[list[Point]] | None = None
    width: int = 213  # of a picture on the page, in pixels


def ring(number: int) -> list[Point]:
    """Return places on an ellipse around the middle of the ground."""
    angles = [2 * pi * i / number for i in range(number)]
    return [Point(x=0.5 + 0.27 * sin(angle), y=0.52 - 0.17 * cos(angle)) for angle in angles]


PARTS = [
    Part(
        "scenes",
        "One to three objects, as in i-CLEVR",
        "iclevr-320x240-1step",
        [
            ["red cube"],
            ["cyan sphere", "brown cylinder"],
            ["yellow cube", "purple cylinder", "gray sphere"],
            ["blue cylinder", "blue sphere", "blue cube"],
            ["green sphere", "red cylinder"],
            ["gray cube", "gray cylinder", "cyan cube"],
            ["purple sphere"],
            ["brown cube", "yellow sphere", "green cylinder"],
        ],
    ),
    Part(
        "many",
        "Five, eight and ten objects",
        "iclevr-320x240-1step",
        [
            ["red cube", "green cube", "blue sphere", "yellow cylinder", "gray sphere"],
            CYLINDERS,
            [*SPHERES, "red cube", "yellow cylinder"],
            [*CUBES, "blue sphere", "gray cylinder"],
        ],
    ),
    Part(
        "rings",
        "Objects at requested places: rings of eight",
        "iclevr-320x240-1step",
        [CUBES, SPHERES, CYLINDERS, CUBES[:4] + SPHERES[4:]],
        [ring(8)] * 4,
    ),
    Part(
        "labels",
        "A model that has seen no positions, the task of the course",
        "iclevr-64-labels",
        [
            ["red cube", "blue sphere"],
            ["gray cylinder"],
            ["cyan cube", "purple sphere", "green cylinder"],
            ["blue cube"],
        ],
        width=128,
    ),
    Part(
        "emoji",
        "Emoji of a skin tone, a gender and an activity",
        "emoji-64",
        [
            ["medium skin", "man", "surfing"],
            ["light skin", "woman", "cook"],
            ["dark skin", "man", "judge"],
            ["medium-dark skin", "woman", "farmer"],
        ],
        width=64,
    ),
]


def draw(client: Client, part: Part, page: Path) -> str:
    """Draw a part's pictures beside the page. Return its text."""
    job = client.generate(part.labels, layouts=part.layouts, model=part.model, seed=SEED)
    assert job.result is not None  # the job is finished: an error would have been raised
    pictures = job.result.pictures
    tags = []
    for i, picture in enumerate(pictures):
        file = page.parent / f"{part.name}-{i}.png"
        file.write_bytes(client.image(job.id, i))
        said = ", ".join(picture.labels)
        tags.append(f'<img src="{file.name}" title="{said}" alt="{said}" width="{part.width}">')
    exact = sum(picture.exact for picture in pictures)
    verdict = f"The evaluator finds exactly the requested labels in {exact} of {len(tags)}."
    return f"## {part.text}\n\nDrawn by [`{part.model}`](../../models/{part.model}.md). {verdict}\n\n" + "\n".join(tags)


HEAD = f"""# Gallery

What the included models draw, with seed {SEED}: the first pictures, not chosen ones. Hold the pointer over a picture to
see its labels. Each carries its [recipe](../api.md#recipes): drop it on the page of a service to draw it again. To draw
them all again, run `make serve`, and `python examples/gallery.py docs/gallery/README.md` in another terminal.
"""


def main(parts: Sequence[Part] = PARTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the page to write, such as docs/gallery/README.md")
    page = parser.parse_args().page
    page.parent.mkdir(parents=True, exist_ok=True)
    with Client() as client:
        page.write_text("\n".join([HEAD, *(draw(client, part, page) + "\n" for part in parts)]))


if __name__ == "__main__":
    main()
