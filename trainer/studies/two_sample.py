"""A classifier two-sample test (Lopez-Paz & Oquab 2017): can a small network tell generated pictures from the data's?

It learns from three quarters of both and is tested on the rest. An accuracy of 0.5 means that it sees no difference;
what it reaches is a lower bound of what can be told. Unlike scores it sees edges, grain and light, and not the labels.

Two kinds of networks are asked. The detail network is a sibling of the discriminators that upsamplers learn against
(`trainer/objectives/adversary.py`): the same layers, unshuffling and enhanced detail. What those no longer see, it may
overlook as well. So a ResNet on plain RGB, which shares nothing with them, is asked too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import fast
from shared.diffusion.denoise import finish
from shared.diffusion.model import Denoiser
from shared.options import SamplingOptions, picture_seed
from shared.pictures import grid, png_bytes, resized, to_uint8
from shared.resnet import Block
from trainer.data import Dataset, layouts_of, read_all, to_float
from trainer.errors import TrainerError
from trainer.studies.study import Report, Subject

FOLDS = 4  # a quarter is tested by a network that learnt from the others, so each crop is tested once
SIDE, CROPS = 56, 4  # side of a crop in pixels, and crops of each picture
COLOURED = 0.12  # difference of a coloured pixel's channels, of a range of 1; the background's is below 0.05
STEPS, BATCH, LR = 600, 32, 2e-3  # of each network
CHANNELS = (16, 32, 64, 128)  # of the ResNet's layers: a quarter of ResNet-10's
SHIFT = 4  # pixels by which it sees crops moved while it learns, at most
BRIGHTER, COLOURED_BY = 4 / 127.5, 2 / 127.5  # and by which all channels, and each, are changed: levels of 256
SHOWN = 12  # crops of each kind in a grid
GENERATED_AT_ONCE = 32


NetworkName = Literal["detail network", "ResNet on RGB"]


@dataclass(frozen=True)
class Verdicts:
    """What networks said about crops that they had not learnt from."""

    accuracies: Tensor  # (FOLDS,), or fewer
    scores: Tensor  # (2, N): of each crop of the two sets, the higher, the surer that it is of the second


def crops(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Cut CROPS squares around random coloured pixels out of each of (N, 3, H, W) uint8: (CROPS N, 3, SIDE, SIDE).

    A picture without coloured pixels is cut anywhere, and a smaller picture is not cut.
    """
    width, found = pictures.shape[3], []
    for picture in pictures:
        coloured = (picture.amax(0).float() - picture.amin(0).float()) > COLOURED * 255
        weights = coloured.float().flatten() + 1e-9
        for pixel in torch.multinomial(weights, CROPS, replacement=True, generator=generator).tolist():
            found.append(_square(picture, pixel // width, pixel % width))
    return torch.stack(found)


def crops_around(pictures: Tensor, layouts: Tensor, around: Sequence[int]) -> Tensor:
    """Cut a square around each object whose label is one of `around` out of pictures (N, 3, H, W) uint8.

    layouts (N, K, 3 or more): labels and positions, as `layouts.with_positions` joins them.
    """
    height, width = pictures.shape[2:]
    found = []
    for picture, layout in zip(pictures, layouts, strict=True):
        for there, x, y in layout[list(around), :3].tolist():
            if there:
                found.append(_square(picture, int(y * height), int(x * width)))
    return torch.stack(found) if found else pictures[:0]


def _square(picture: Tensor, row: int, column: int) -> Tensor:
    """Return the square of SIDE pixels around a pixel, moved into the picture; of a smaller picture, all there is."""
    sides = picture.shape[1:]
    y, x = (
        min(max(at - min(SIDE, side) // 2, 0), side - min(SIDE, side))
        for at, side in zip((row, column), sides, strict=True)
    )
    return picture[:, y : y + SIDE, x : x + SIDE]


def with_noise(pictures: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Add normal noise of `deviation` levels of 256 to pictures (N, 3, h, w) uint8: it hides what is weaker."""
    noise = deviation * torch.randn(pictures.shape, generator=generator)
    return (pictures + noise).round_().clamp_(0, 255).to(torch.uint8)


class Detail(nn.Module):
    """Adds channels of a picture's detail, enhanced: (N, C, H, W) -> (N, 2 C, H, W). Edges differ before light does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 8 * (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))], 1)


def _detail_network() -> nn.Module:
    """Return a network of (N, 3, h, w) -> (N, 1). It sums what it sees in windows of 36 pixels."""
    layers: list[nn.Module] = [Detail(), nn.PixelUnshuffle(2)]
    for c_in, c_out, stride in ((24, 32, 1), (32, 64, 2), (64, 96, 2), (96, 96, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 1))


def _resnet() -> nn.Module:
    """Return a ResNet-10 of few channels, (N, 3, h, w) -> (N, 1), with a 3x3 stem for small pictures.

    Its windows are larger than a crop.
    """
    first = CHANNELS[0]
    layers: list[nn.Module] = [nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    layers.append(Block(first, first, 1))
    layers += [Block(c_in, c_out, 2) for c_in, c_out in itertools.pairwise(CHANNELS)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 1))


NETWORKS: Final[dict[NetworkName, Callable[[], nn.Module]]] = {
    "detail network": _detail_network,
    "ResNet on RGB": _resnet,
}


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, shift and tint each of x (N, 3, h, w), in [-1, 1], at random. Edges are repeated."""
    N, _, height, width = x.shape
    x = x.where(torch.rand(N, 1, 1, 1, generator=generator) < 0.5, x.flip(3))
    moves = torch.randint(2 * SHIFT + 1, (N, 2), generator=generator).tolist()
    padded = F.pad(x, (SHIFT,) * 4, mode="replicate")
    x = torch.stack(
        [one[:, top : top + height, left : left + width] for one, (top, left) in zip(padded, moves, strict=True)]
    )
    light = BRIGHTER * (2 * torch.rand(N, 1, 1, 1, generator=generator) - 1)
    return x + light + COLOURED_BY * (2 * torch.rand(N, 3, 1, 1, generator=generator) - 1)


def _learn(
    x: Tensor, y: Tensor, steps: int, device: torch.device, generator: torch.Generator, kind: NetworkName
) -> nn.Module:  # fmt: skip
    """Return a network in evaluation mode that has learnt to tell pictures x (N, 3, h, w) uint8 as y (N,) says.

    Only the ResNet sees them augmented: small shifts and tints would hide detail.
    """
    network = NETWORKS[kind]()
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(x), (BATCH,), generator=generator)
        shown = to_float(x[index])
        if kind == "ResNet on RGB":
            shown = augmented(shown, generator)
        with fast(device):
            out = network(shown.to(device, memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(out[:, 0].float(), y[index].to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return network.eval()


@torch.inference_mode()
def _scores(network: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    with fast(device):
        return torch.cat([network(to_float(part).to(device))[:, 0].float().cpu() for part in torch.split(x, BATCH)])


def tell_apart(
    first: Tensor, second: Tensor, device: torch.device, seed: int, advance: Callable[[int], None] = lambda _: None,
    *, kind: NetworkName = "detail network", longer: int = 1, folds: int = FOLDS,
) -> Verdicts:  # fmt: skip
    """Test whether crops of two sets, each (N, 3, h, w) uint8, can be told apart. Networks learn `longer` times STEPS.

    A fold is a contiguous part of both sets, since neighbours in a folder may show the same scene. Only the first
    `folds` of them are tested; crops of the others have a score of 0.
    """
    N = len(first)
    fold_of = torch.arange(N) * FOLDS // N
    scores, accuracies = torch.zeros(2, N), list[Tensor]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fold in range(folds):
            learnt = fold_of != fold
            generator = torch.Generator().manual_seed(seed)
            x, y = torch.cat([first[learnt], second[learnt]]), torch.arange(2.0).repeat_interleave(int(learnt.sum()))
            network = _learn(x, y, longer * STEPS, device, generator, kind)
            for k, pictures in enumerate((first, second)):
                scores[k, ~learnt] = _scores(network, pictures[~learnt], device)
            right = torch.cat([scores[0, ~learnt] < 0, scores[1, ~learnt] > 0])
            accuracies.append(right.double().mean())
            advance(1)
    return Verdicts(torch.stack(accuracies), scores)


def choose(dataset: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of two sets of `count` labelled pictures, from different parts of the folder.

    TrainerError if there are too few.
    """
    known = dataset.labels.any(1).nonzero()[:, 0]
    if len(known) < 2 * count or count < 2 * FOLDS:
        most = f"at most {len(known) // 2} pictures: half of those with labels"
        raise TrainerError(f"--count {count} needs at least {2 * FOLDS} and {most}")
    chosen = known[torch.linspace(0, len(known) - 1, 2 * count).long()]
    return chosen[:count], chosen[count:]


@torch.inference_mode()
def generate(
    denoiser: Denoiser, dataset: Dataset, index: Tensor, options: SamplingOptions, seed: int, *,
    upsampler_alone: bool = False, advance: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generate a picture for the labels of each of the folder's pictures `index`: (N, 3, H, W) uint8.

    Also returns the labels as the network took them, with positions where it takes some: (N, K, ...). With
    `upsampler_alone`, enlarge the folder's own squeezed pictures instead.
    """
    stepper, made, taken = denoiser.stepper(), list[Tensor](), list[Tensor]()
    for part in torch.split(index, GENERATED_AT_ONCE):
        seeds = [picture_seed(seed, i) for i in part.tolist()]
        rows = stepper.new_rows(dataset.labels[part], [options] * len(part), seeds)
        if upsampler_alone:  # the last step is done
            given = to_float(dataset.images[part]), layouts_of(dataset, denoiser)[part]
            rows = [
                replace(row, x=x, labels=labels, step=len(row.table))
                for row, x, labels in zip(rows, *(each.to(stepper.device) for each in given), strict=True)
            ]
        made.append(torch.from_numpy(to_uint8(finish(stepper, rows))).permute(0, 3, 1, 2))
        taken += [row.labels.cpu() for row in rows]
        advance(len(part))
    return torch.cat(made), torch.stack(taken)


def run(subject: Subject) -> Report:
    """Compare generated pictures with the data's of the same labels, and those with as many others.

    With an upsampler, also at the size that the network samples. With `subject.around`, squares around objects whose
    labels contain this word, at full size alone. The report shows the crops at full size that gave most away, each
    generated one before one of the data's.
    """
    denoiser = subject.denoiser
    if subject.upsampler_alone and (problem := _cannot_enlarge(denoiser)):
        raise TrainerError(f"--upsampler-alone: {denoiser.info.name} {problem}; leave the option out")
    dataset, count, seed = subject.dataset, subject.count or 640, subject.seed
    layouts, around = layouts_of(dataset, denoiser), _named(subject.around, denoiser) if subject.around else None
    chosen, others = choose(dataset, count)
    advance = subject.advance("sampling", count)
    generated, taken = generate(
        denoiser, dataset, chosen, subject.options, seed, upsampler_alone=subject.upsampler_alone, advance=advance
    )
    originals, rest = (read_all(subject.pictures, one) for one in (chosen, others))
    shown, small = torch.empty(0), generated.shape[2:] if around else denoiser.image_shape[1:]
    rows = []
    advance = subject.advance("telling apart")
    for size in dict.fromkeys([generated.shape[2:], torch.Size(small)]):
        sets = []
        for pictures, places in ((originals, layouts[chosen]), (generated, taken), (rest, layouts[others])):
            at = _at(size, pictures)
            found = crops_around(at, places, around) if around else crops(at, torch.Generator().manual_seed(seed))
            sets.append(found)
        if subject.noise:
            generator = torch.Generator().manual_seed(seed)
            sets = [with_noise(one, subject.noise, generator) for one in sets]
        what = "upsampled" if subject.upsampler_alone else "generated"
        for name, compared in ((what, sets[1]), ("the data's", sets[2])):
            first, second = (one[: min(len(sets[0]), len(compared))] for one in (sets[0], compared))
            if len(first) < 2 * FOLDS:
                raise TrainerError(f"only {len(first)} squares around objects; take more pictures (--count)")
            for kind in NETWORKS:
                verdicts = tell_apart(first, second, subject.device, seed, advance, kind=kind, longer=subject.longer)
                accuracy, error = float(verdicts.accuracies.mean()), float(verdicts.accuracies.std()) / FOLDS**0.5
                row = {"size": f"{size[1]}x{size[0]}", "pictures": name, "network": kind}
                rows.append({**row, "accuracy": accuracy, "standard_error": error})
                if not len(shown):
                    most = min(SHOWN, len(first))
                    worst = verdicts.scores[1].topk(most).indices
                    best = verdicts.scores[0].topk(most, largest=False).indices
                    shown = to_float(torch.stack([second[worst], first[best]], 1).flatten(0, 1))
    title = f"{count} pictures of {denoiser.info.name} told from the folder's"
    return Report(title, rows, png=png_bytes(grid(shown)))


def _cannot_enlarge(denoiser: Denoiser) -> str | None:
    """Return why the denoiser's upsampler cannot enlarge other pictures than its own, or None if it can."""
    if denoiser.upsampler is None:
        return "has no upsampler"
    return "draws in one network call, and its upsampler needs the denoiser's features" if denoiser.one_call else None


def _named(word: str, denoiser: Denoiser) -> list[int]:
    """Return the labels that contain a word. TrainerError if there are none, or if the denoiser takes no positions."""
    if denoiser.layouts is None:
        raise TrainerError(f"--around needs the objects' places; {denoiser.info.name} takes no positions")
    found = [i for i, name in enumerate(denoiser.vocabulary.names) if word in name]
    if not found:
        raise TrainerError(f'--around "{word}": no label of {denoiser.info.name} contains it')
    return found


def _at(size: Sequence[int], pictures: Tensor) -> Tensor:
    """Return pictures (N, 3, H, W) uint8 at another size."""
    if pictures.shape[2:] == torch.Size(size):
        return pictures
    parts = [resized(to_float(part), (size[0], size[1])) for part in torch.split(pictures, GENERATED_AT_ONCE)]
    return torch.cat([torch.from_numpy(to_uint8(part)).permute(0, 3, 1, 2) for part in parts])
