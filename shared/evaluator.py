"""The evaluator: a ResNet-18, which names a picture's objects and locates them; scores computed from it.

Must not know sampling. Its labels come from its checkpoint. It is never used to train or guide the denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoint import CheckpointError, CheckpointInfo, load
from shared.openvino import CompiledNetwork, uses_openvino
from shared.options import THRESHOLD, EngineName
from shared.pictures import resized, without_padding
from shared.resnet import BLOCKS, ResNet
from shared.storage import Location
from shared.vocabulary import Vocabulary

IMAGE_SIZE = 64  # the network's input; other pictures are resized to it
LOCATOR = "locator."  # prefix of the position head's tensors in a checkpoint; the course's evaluator has none


class Judge(Protocol):
    """Anything that judges pictures: an evaluator, or one behind a crop."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def probabilities(self, images: Tensor) -> Tensor: ...

    def positions(self, images: Tensor) -> Tensor | None: ...


class Locator(nn.Module):
    """The position head: for each label a heatmap over 8 x 8 cells, and in each cell an offset from its centre.

    The position is the heatmap's mean, as in integral regression (Sun et al. 2018).
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.labels = labels
        self.convs = nn.Sequential(
            nn.Conv2d(128 + 256, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
            nn.Conv2d(128, 3 * labels, 1),
        )  # fmt: skip

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 128, H, W) and (N, 256, H/2, W/2), of layers 2 and 3 -> positions and logarithms of the heatmaps.

        Positions are fractions of width and height, (N, K, 2); heatmaps are (N, K, H W).
        """
        height, width = fine.shape[-2:]
        maps = self.convs(torch.cat([fine, F.interpolate(coarse, size=(height, width))], 1)).float()
        heat, offsets = maps.split([self.labels, 2 * self.labels], 1)
        rows, columns = (torch.arange(n, device=maps.device).add(0.5) / n for n in (height, width))
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2, H, W): x, y
        points = cells.flatten(1) + offsets.unflatten(1, (self.labels, 2)).flatten(3)  # (N, K, 2, H W)
        logarithms = heat.flatten(2).log_softmax(-1)  # (N, K, H W)
        return (logarithms.exp()[:, :, None] * points).sum(-1), logarithms


class Evaluator(nn.Module):
    """ResNet-18 (He et al. 2016) with a linear layer and a sigmoid for K labels, as in the course's evaluator.py.

    `resnet` has the course's names in its state dict, so weights can be exchanged in both directions. `locates`: it has
    a position head beside it. `architecture`: a key of `BLOCKS`; only a ResNet-18 is the course's.
    """

    edges: Final = ("resnet.fc", "locator")  # last layers, which Muon leaves to AdamW

    def __init__(
        self,
        vocabulary: Vocabulary,
        info: CheckpointInfo | None = None,
        *,
        locates: bool = False,
        architecture: str = "resnet18",
    ) -> None:
        super().__init__()
        self.vocabulary, self.info, self.architecture = vocabulary, info, architecture
        self.resnet = ResNet(nn.Sequential(nn.Linear(512, len(vocabulary)), nn.Sigmoid()), BLOCKS[architecture])
        self.locator = Locator(len(vocabulary)) if locates else None
        self._compiled: CompiledNetwork | None = None

    def freeze(self, engine: EngineName = "auto", kept: Path | None = None) -> Evaluator:
        """Switch to eval mode for good, in which `engine` judges, and return self. EngineError if it is not there.

        `kept`: a folder of this checkpoint's own that keeps the compiled network.
        """
        self.eval().requires_grad_(False)
        if uses_openvino(engine, next(self.parameters()).device):
            example = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
            self._compiled = CompiledNetwork(Views(self), [example], kept and kept / "evaluator")
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(N, 3, 64, 64) in [-1, 1] (mean and std 0.5) -> logits (N, K), and what the position head returns."""
        fine, coarse, last = self.resnet(images)
        return self.resnet.fc[0](last.mean((2, 3))), self.locator(fine, coarse) if self.locator else None

    @torch.inference_mode()
    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        """Return each label's probability: images (N, 3, H, W), clamped to [-1, 1] -> (N, K) float32 on the CPU.

        Needs eval mode. FloatingPointError if a probability is not finite, since scores of it would be plausible.
        """
        found = self._view(images, batch)[0]
        if not found.isfinite().all():
            raise FloatingPointError("the evaluator's output is not finite")
        return found

    @torch.inference_mode()
    def positions(self, images: Tensor, *, batch: int = 64) -> Tensor | None:
        """Return where each label's object is: images as for `probabilities` -> (N, K, 2) float32 on the CPU.

        Fractions of width and height of an object's centre, from the upper left corner. They mean something only for
        labels that the picture shows. None if the checkpoint has no position head.
        """
        return None if self.locator is None else self._view(images, batch)[2]

    @torch.inference_mode()
    def features(self, images: Tensor, *, batch: int = 64) -> Tensor:
        """Return features in which similar pictures are close: images as for `probabilities` -> (N, 512) float32."""
        return self._view(images, batch)[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of its checkpoint: under the course's names, and the position head's under `LOCATOR`."""
        tensors: dict[str, Tensor] = self.resnet.state_dict()
        head = self.locator.state_dict() if self.locator else {}
        return tensors | {LOCATOR + key: value for key, value in head.items()}

    def _view(self, images: Tensor, batch: int) -> list[Tensor]:
        """Return what `Views` does for any number of pictures of any size, on the CPU."""
        if not len(images):
            labels = len(self.vocabulary)
            return [torch.zeros(0, labels), torch.zeros(0, 512), torch.zeros(0, labels, 2)]
        device, network = next(self.parameters()).device, self._compiled or Views(self)
        parts = [network(as_input(x.to(device, torch.float32).clamp(-1, 1))) for x in torch.split(images, batch)]
        return [torch.cat(results).cpu() for results in zip(*parts, strict=True)]


class Views(nn.Module):
    """All that an evaluator says of pictures: (N, 3, 64, 64) -> probabilities (N, K), features (N, 512), positions.

    Positions are (N, K, 2), and absent without a position head.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self.resnet, self.locator = evaluator.resnet, evaluator.locator

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        fine, coarse, last = self.resnet(images)
        pooled = last.mean((2, 3))
        views = self.resnet.fc(pooled), pooled
        return views if self.locator is None else (*views, self.locator(fine, coarse)[0])


@dataclass(frozen=True)
class JudgeInside:
    """Crops the padding before judging, since evaluators are trained on pictures without it."""

    judge: Judge
    aspect: float  # width over height before padding

    @property
    def vocabulary(self) -> Vocabulary:
        return self.judge.vocabulary

    def probabilities(self, images: Tensor) -> Tensor:
        return self.judge.probabilities(without_padding(images, self.aspect))

    def positions(self, images: Tensor) -> Tensor | None:
        """Return fractions of the padded picture."""
        inside = without_padding(images, self.aspect)
        if (found := self.judge.positions(inside)) is None:
            return None
        (height, width), side = inside.shape[-2:], images.shape[-1]
        border = torch.tensor([(side - width) // 2, (side - height) // 2])
        return (found * torch.tensor([width, height]) + border) / side


def cropping_judge(judge: Judge, aspect: float) -> Judge:
    """Return a judge for pictures that were padded from this `aspect`; for 1.0 (squeezed ones), `judge` itself."""
    return judge if aspect == 1.0 else JudgeInside(judge, aspect)


def as_input(images: Tensor) -> Tensor:
    """Resize (N, 3, H, W) to the network's input, (N, 3, 64, 64)."""
    return resized(images, (IMAGE_SIZE, IMAGE_SIZE))


def load_evaluator(
    path: Location | str,
    device: str | torch.device = "cpu",
    engine: EngineName = "auto",
    kept: Path | None = None,
) -> Evaluator:
    """Load a checkpoint. `engine` and `kept`: see `freeze`.

    Raises CheckpointError if the file is none, EngineError as `freeze`.
    """
    path = Path(path) if isinstance(path, str) else path
    info, tensors = load(path)
    if info.kind != "evaluator":
        raise CheckpointError(path.name, f"holds a {info.kind}, not an evaluator")
    head = {key.removeprefix(LOCATOR): tensors.pop(key) for key in list(tensors) if key.startswith(LOCATOR)}
    return make_evaluator(path.name, info.labels, tensors, head, info, device=device, engine=engine, kept=kept)


def make_evaluator(
    name: str, vocabulary: Vocabulary, state: Mapping[str, Any], head: Mapping[str, Any] | None = None,
    info: CheckpointInfo | None = None, *, device: str | torch.device = "cpu", engine: EngineName = "auto",
    kept: Path | None = None,
) -> Evaluator:  # fmt: skip
    """Assemble an evaluator of its ResNet's tensors and those of the position `head`. `name`: of their file.

    Without `info` it is a ResNet-18. Raises CheckpointError if they do not fit, EngineError as `freeze`.
    """
    architecture = info.config.get("architecture", "resnet18") if info else "resnet18"
    if architecture not in BLOCKS:
        raise CheckpointError(name, f"its architecture is {architecture!r}; known are {', '.join(BLOCKS)}")
    with torch.device("meta"):  # no initial weights: the checkpoint's take their place, and drawing them is slow
        evaluator = Evaluator(vocabulary, info, locates=bool(head), architecture=architecture)
    try:
        evaluator.resnet.load_state_dict(state, assign=True)
        if evaluator.locator and head:
            evaluator.locator.load_state_dict(head, assign=True)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(name, f"weights do not fit {architecture}: {short(error)}") from error
    return evaluator.to(device).float().freeze(engine, kept)


def short(error: Exception) -> str:
    """Return the first 200 characters of a torch error, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@dataclass(frozen=True)
class PictureScore:
    """One picture's score. accuracy: hits / k, where k labels were requested and `hits` of them are in the top k."""

    accuracy: float
    hits: int
    k: int
    f1: float  # of the labels found (probability over 0.5) against those requested
    exact: bool  # the labels found are exactly those requested


@dataclass(frozen=True)
class SetScore:
    """The score of a set of pictures. accuracy: sum of hits / sum of k, as in the course's eval()."""

    accuracy: float
    exact_match: float  # fraction of pictures
    f1: float  # mean over pictures
    per_label_recall: dict[str, float]  # label -> fraction of the pictures with it in which it is in the top k


def _top_k(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return (N, K) bool: each picture's k most probable labels, where k is its number of targets."""
    rank = probabilities.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < targets.sum(1, keepdim=True)


def score_pictures(probabilities: Tensor, targets: Tensor) -> list[PictureScore]:
    """Score each picture from probabilities (N, K) and multi-hot targets (N, K), each row with at least one label."""
    asked = targets > 0.5
    found = probabilities > THRESHOLD
    hits = (_top_k(probabilities, asked) & asked).sum(1).tolist()
    k = asked.sum(1).tolist()
    f1 = (2 * (found & asked).sum(1) / (found.sum(1) + asked.sum(1)).clamp(min=1)).tolist()
    exact = (found == asked).all(1).tolist()
    return [PictureScore(h / n, h, n, f, e) for h, n, f, e in zip(hits, k, f1, exact, strict=True)]


def score_set(probabilities: Tensor, targets: Tensor, names: Sequence[str]) -> SetScore:
    """Score a set of at least one picture from probabilities (N, K) and multi-hot targets (N, K)."""
    pictures = score_pictures(probabilities, targets)
    asked = targets > 0.5
    hit = (_top_k(probabilities, asked) & asked).sum(0).tolist()
    times = asked.sum(0).tolist()
    return SetScore(
        accuracy=sum(p.hits for p in pictures) / sum(p.k for p in pictures),
        exact_match=sum(p.exact for p in pictures) / len(pictures),
        f1=sum(p.f1 for p in pictures) / len(pictures),
        per_label_recall={name: h / n for name, h, n in zip(names, hit, times, strict=True) if n},
    )
