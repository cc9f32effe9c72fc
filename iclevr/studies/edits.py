"""Measures edits by label: whether the edited picture is right, and how much changes away from what was edited.

Each scene is drawn where the denoiser's layouts place its objects, and drawn again with an object added, removed, moved
or recoloured. Renders of both scenes tell which pixels an edit may change: an object hides others and casts shadows.
A small network then tries to tell edited pictures from fresh ones of the same labels (`two_sample.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from iclevr.scenes.render import render, visible_pixels
from iclevr.scenes.render_folder import VISIBLE_PIXELS
from iclevr.scenes.scene import COLORS, HALF_SIDE, SceneObject, breaches, ground_position, picture_position
from iclevr.studies.renders import check_renders
from shared.diffusion.denoise import Row, finish
from shared.diffusion.edits import places_of, with_objects
from shared.diffusion.layouts import ROTATION
from shared.diffusion.model import Denoiser
from shared.edits import Edit, Named, Placed, Relabelled, edited
from shared.evaluator import Evaluator, score_pictures
from shared.options import picture_seed
from shared.pictures import grid, png_bytes, resized, to_images, to_uint8
from shared.support import Place
from trainer.errors import TrainerError
from trainer.score import targets_of
from trainer.studies.study import Report, Subject
from trainer.studies.two_sample import CROPS, FOLDS, crops, tell_apart

KINDS = ("add", "remove", "move", "recolour")
IN_A_ROW = 10  # edits of one picture
CHAINS = 10  # scenes for each of these
TOGETHER = 4  # scenes that are sampled together
CHANGED = 8  # levels of 256, in any channel, from which a pixel counts as changed
RENDERED = 4  # levels from which an edit changes a render
MARGIN = 6  # pixels of 320 around what it changes
TRIES = 200  # places for an object, before another scene is taken
SHOWN = 4  # scenes in the picture


@dataclass
class Picture:
    """A picture of a chain: how it is sampled, what it shows, and once it is sampled, its pixels."""

    row: Row
    names: list[str]
    pixels: np.ndarray | None = None  # (H, W, 3) uint8
    exact: bool = False


class Editor:
    """Draws random scenes of a denoiser, and edits of them."""

    def __init__(self, subject: Subject) -> None:
        self.denoiser: Denoiser = subject.denoiser
        self.judge: Evaluator = subject.judge
        if self.denoiser.layouts is None or self.denoiser.aspect != 1.0:
            raise TrainerError(f"{self.denoiser.info.name} takes no positions in pictures without padding")
        check_renders(self.denoiser.vocabulary, self.denoiser.info.name)
        check_renders(self.judge.vocabulary, "the evaluator")
        self.stepper, self.options = subject.stepper, subject.options
        self.rng, self.seed, self.drawn = np.random.default_rng([subject.seed, 6]), subject.seed, 0

    def scene(self) -> Picture:
        """Return a random scene of two objects to one fewer than the denoiser draws."""
        vocabulary, most = self.denoiser.vocabulary, self.denoiser.info.support.objects[1]
        count = int(self.rng.integers(2, max(3, most)))
        return self.fresh([vocabulary.names[i] for i in self.rng.permutation(len(vocabulary))[:count]])

    def fresh(self, names: list[str]) -> Picture:
        """Return a picture of these objects with places and noise of its own."""
        self.drawn += 1
        seed = picture_seed(self.seed, self.drawn)
        return Picture(self.stepper.new_row(self.denoiser.vocabulary.multi_hot(names), self.options, seed), names)

    def edit(self, picture: Picture, kind: str) -> Picture | None:
        """Return a picture with a random edit of this kind; None if there is none that leaves every object visible."""
        change = self._change(picture, kind)
        if change is None:
            return None
        objects, before = edited(picture.names, [change]), picture.row
        again = Row(
            before.x, with_objects(before.labels, objects, self.denoiser.vocabulary), before.options, before.table,
            before.w, before.generator.clone_state(),
        )  # fmt: skip
        return Picture(again, [one.label for one in objects])

    def _change(self, picture: Picture, kind: str) -> Edit | None:
        names, rng = picture.names, self.rng
        chosen = names[int(rng.integers(len(names)))]
        others = [name for name in self.denoiser.vocabulary.names if name not in names]
        if kind == "remove":
            return Edit(remove=Named(label=chosen)) if len(names) > 1 else None
        if kind == "recolour":
            shape = chosen.split()[1]
            colours = [name for name in (f"{colour} {shape}" for colour in COLORS) if name in others]
            return Edit(recolour=Relabelled(label=chosen, to=colours[int(rng.integers(len(colours)))]))
        if kind == "add":
            if len(names) >= self.denoiser.info.support.objects[1]:
                return None
            chosen = others[int(rng.integers(len(others)))]
        place = self._free(picture, chosen)
        if place is None:
            return None
        placed = Placed(label=chosen, x=place[0], y=place[1])
        return Edit(add=placed) if kind == "add" else Edit(move=placed)

    def _free(self, picture: Picture, label: str) -> Place | None:
        """Draw a place that CLEVR's rules allow, at which the object is seen and hides no other."""
        kept = [one for one in self.objects(picture) if f"{one.color} {one.shape}" != label]
        seen = visible_pixels(kept)
        colour, shape = label.split()
        for _ in range(TRIES):
            x, y = self.rng.uniform(-HALF_SIDE, HALF_SIDE, 2)
            new = SceneObject(shape, colour, float(x), float(y), 0.0)
            if any(breach > 0 for breach in breaches([(one.x, one.y) for one in kept], new.x, new.y)):
                continue
            now = visible_pixels([*kept, new])
            if all(n >= min(before, VISIBLE_PIXELS) for n, before in zip(now, [*seen, VISIBLE_PIXELS], strict=True)):
                return picture_position(new)
        return None

    def objects(self, picture: Picture) -> list[SceneObject]:
        """Return the scene of a picture, as its network is given it."""
        vocabulary, labels = self.denoiser.vocabulary, picture.row.labels.cpu()
        places = places_of(labels, picture.names, vocabulary) or ()
        scene = []
        for name, place in zip(picture.names, places, strict=True):
            colour, shape = name.split()
            cosine, sine = labels[vocabulary.index(name), ROTATION].tolist() if labels.shape[1] >= 5 else (1.0, 0.0)
            quarter_turns = math.atan2(sine, cosine) / (2 * math.pi)
            scene.append(SceneObject(shape, colour, *ground_position(place), quarter_turns * math.pi / 2))
        return scene

    def sample(self, pictures: Sequence[Picture]) -> None:
        """Sample and judge pictures."""
        images = finish(self.stepper, [one.row for one in pictures])
        targets = targets_of([one.names for one in pictures], self.judge.vocabulary)
        scores = score_pictures(self.judge.probabilities(images), targets)
        for one, pixels, score in zip(pictures, to_uint8(images), scores, strict=True):
            one.pixels, one.exact = pixels, score.exact

    def changed(self, before: Picture, after: Picture) -> float:
        """Return the share of pixels that changed away from what the edits between two pictures may change."""
        assert before.pixels is not None
        assert after.pixels is not None
        scenes = to_images(render([self.objects(before), self.objects(after)], samples=1))
        apart = (scenes[0] - scenes[1]).abs().amax(0) * 127.5 > RENDERED  # (240, 320)
        size = 2 * MARGIN + 1
        near = F.max_pool2d(apart[None, None].float(), size, stride=1, padding=MARGIN)
        away = resized(near, before.pixels.shape[:2])[0, 0].numpy() == 0
        levels = np.abs(before.pixels.astype(int) - after.pixels).max(-1)
        return float((levels > CHANGED)[away].mean())


def run(subject: Subject) -> Report:
    """Edit `count` scenes in each of four ways, and some ten times in a row; draw fresh pictures to tell them from."""
    editor, count = Editor(subject), subject.count or 200
    chains = max(1, count // CHAINS)
    total = count * (1 + 2 * len(KINDS)) + chains * (1 + IN_A_ROW)
    advance = subject.advance("editing (pictures)", total)
    pairs: dict[str, list[tuple[bool, float]]] = {kind: [] for kind in KINDS}
    originals, shown, made = list[bool](), list[Picture](), list[Picture]()
    for scenes in _several(editor, count):
        flat = [one for scene in scenes for one in scene]
        editor.sample(flat)
        for first, *others in scenes:
            originals.append(first.exact)
            for kind, other in zip(KINDS, others, strict=True):
                pairs[kind].append((other.exact, editor.changed(first, other)))
            made += others
        shown += [one for scene in scenes for one in scene][: max(0, SHOWN * (1 + len(KINDS)) - len(shown))]
        advance(len(flat))
    rows = [_figures("no edit", originals, [])]
    rows += [_figures(kind, *zip(*found, strict=True)) for kind, found in pairs.items()]
    steps, whole, last = list[float](), list[float](), list[bool]()
    for _ in range(chains):
        chain = _chain(editor)
        editor.sample(chain)
        steps += [editor.changed(*pair) for pair in itertools.pairwise(chain)]
        whole.append(editor.changed(chain[0], chain[-1]))
        last.append(chain[-1].exact)
        advance(len(chain))
    rows += [_figures(f"{IN_A_ROW} in a row, from one to the next", last, steps)]
    rows += [_figures(f"{IN_A_ROW} in a row, from the first to the last", last, whole)]
    fresh = [editor.fresh(one.names) for one in made]
    for at in range(0, len(fresh), TOGETHER):
        editor.sample(fresh[at : at + TOGETHER])
        advance(TOGETHER)
    told = tell(made, fresh, subject)
    rows.append(_figures("fresh, of the same labels", [one.exact for one in fresh], []) | told)
    title = f"{count} scenes, {chains} of them edited {IN_A_ROW} times in a row"
    pictures = torch.from_numpy(np.stack([one.pixels for one in shown if one.pixels is not None]))
    return Report(title, rows, png=png_bytes(grid(to_images(pictures.numpy()), columns=1 + len(KINDS))))


def tell(edited: Sequence[Picture], fresh: Sequence[Picture], subject: Subject) -> dict[str, float]:
    """Return how often a network tells edited from fresh pictures, by squares around objects; chance is 0.5.

    It learns from three quarters of them. The standard error is that of the other pictures' means.
    """

    def squares(pictures: Sequence[Picture]) -> Tensor:
        pixels = np.stack([one.pixels for one in pictures if one.pixels is not None])
        return crops(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.Generator().manual_seed(subject.seed))

    first, second = squares(edited), squares(fresh)
    verdicts = tell_apart(first, second, subject.device, subject.seed, longer=subject.longer, folds=1)
    tested = verdicts.scores[:, : len(first) // FOLDS]
    right = torch.cat([tested[0] < 0, tested[1] > 0]).double().view(-1, CROPS).mean(1)
    return {"told_from_fresh": float(right.mean()), "standard_error": float(right.std()) / len(right) ** 0.5}


def _figures(edits: str, exact: Sequence[bool], changed: Sequence[float]) -> dict[str, object]:
    shares = torch.tensor(changed, dtype=torch.float64)
    return {
        "edit": edits,
        "pictures": len(exact),
        "exact_match": sum(exact) / len(exact),
        "changed_away": float(shares.mean()) if changed else None,
        "changed_away_worst": float(shares.max()) if changed else None,
        "told_from_fresh": None,
        "standard_error": None,
    }


def _several(editor: Editor, count: int) -> Iterator[list[list[Picture]]]:
    """Yield scenes, each with its four edits, in groups."""
    group = list[list[Picture]]()
    while count:
        first = editor.scene()
        others = [editor.edit(first, kind) for kind in KINDS]
        if any(one is None for one in others):
            continue
        group.append([first, *(one for one in others if one)])
        count -= 1
        if len(group) == TOGETHER or not count:
            yield group
            group = []


def _chain(editor: Editor) -> list[Picture]:
    """Return a scene and the pictures of ten edits, each of the one before. Possible kinds alternate."""
    chain, turn = [editor.scene()], 0
    while len(chain) <= IN_A_ROW:
        if (new := editor.edit(chain[-1], KINDS[turn % len(KINDS)])) is not None:
            chain.append(new)
        turn += 1
    return chain
