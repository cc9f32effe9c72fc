"""The evaluator: the course's ResNet-18 that names the objects in a picture, and the scores that follow from it.

Knows no sampling and no labels of its own: its checkpoint carries them. Never used to train or steer the denoiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from shared.checkpoint import CheckpointError, CheckpointInfo, load
from shared.device import autocast_dtype
from shared.diffusion.packed import FoldedResNet, can_fold
from shared.pictures import without_padding
from shared.storage import Location
from shared.vocabulary import ICLEVR, Vocabulary

IMAGE_SIZE = 64  # the network's input; other pictures are resized to it
THRESHOLD = 0.5  # a label counts as found from this probability on


class Judge(Protocol):
    """What is asked of an evaluator where pictures are judged."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def probabilities(self, images: Tensor) -> Tensor: ...


class Evaluator(nn.Module):
    """ResNet-18 (He et al. 2016) with a linear layer and a sigmoid for K labels, as in the course's evaluator.py.

    The state dict's names are the course's own, so either side's weights load into the other.
    """

    def __init__(self, vocabulary: Vocabulary, info: CheckpointInfo | None = None) -> None:
        super().__init__()
        self.vocabulary, self.info = vocabulary, info
        self.resnet = resnet18(weights=None)
        self.resnet.fc = nn.Sequential(nn.Linear(512, len(vocabulary)), nn.Sigmoid())
        self._folded: FoldedResNet | None = None

    def freeze(self) -> Evaluator:
        """Itself, in eval mode and never to be trained again: on a CPU its layers are folded, to judge faster.

        In bfloat16 where the CPU multiplies it; the shipped evaluator's card says how far that is from float32.
        """
        self.eval().requires_grad_(False)
        if can_fold(device := next(self.parameters()).device):
            self._folded = FoldedResNet(self.resnet, autocast_dtype(device) or torch.float32)
        return self

    def _trunk(self, images: Tensor) -> Tensor:
        """(N, 3, 64, 64) in [-1, 1] (mean and std 0.5) -> (N, 512), what the last layer reads the labels from."""
        if self._folded is not None:
            return self._folded(images)
        net = self.resnet
        h = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        features: Tensor = net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(h))))).flatten(1)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, 64, 64) in [-1, 1] (mean and std 0.5) -> (N, K), before the sigmoid."""
        logits: Tensor = self.resnet.fc[0](self._trunk(images))
        return logits

    def _chunks(self, images: Tensor, batch: int) -> Iterator[Tensor]:
        """Images (N, 3, H, W) as the network takes them: in [-1, 1], of its size, on its device."""
        device = next(self.parameters()).device
        for chunk in torch.split(images, batch):
            yield as_input(chunk.to(device, torch.float32).clamp(-1, 1))

    @torch.inference_mode()
    def probabilities(self, images: Tensor, *, batch: int = 64) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1], clamped to it -> (N, K) float32 on the CPU. Needs eval mode."""
        chunks = [torch.sigmoid(self.logits(x)).cpu() for x in self._chunks(images, batch) if len(x)]
        return torch.cat(chunks) if chunks else torch.zeros(0, len(self.vocabulary))

    @torch.inference_mode()
    def features(self, images: Tensor, *, batch: int = 64) -> Tensor:
        """Images as for `probabilities` -> (N, 512) float32 on the CPU: pictures with like contents lie near."""
        chunks = [self._trunk(x).cpu() for x in self._chunks(images, batch) if len(x)]
        return torch.cat(chunks) if chunks else torch.zeros(0, 512)


@dataclass(frozen=True)
class JudgeInside:
    """A judge that is shown what lies between the borders of pictures that were padded to squares.

    Evaluators are fitted to pictures squeezed into squares, where objects are higher: of renders padded to 32x32 ours
    finds 0.70 and 0.75 of the labels (`trainer limit FILE --size 32 --fit pad --keep-padding`).
    """

    judge: Judge
    aspect: float  # width over height of a picture before it was padded

    @property
    def vocabulary(self) -> Vocabulary:
        return self.judge.vocabulary

    def probabilities(self, images: Tensor) -> Tensor:
        return self.judge.probabilities(without_padding(images, self.aspect))


def judge_of(judge: Judge, aspect: float) -> Judge:
    """The judge of pictures padded from such an `aspect`; of squeezed ones, 1.0, `judge` itself."""
    return judge if aspect == 1.0 else JudgeInside(judge, aspect)


def as_input(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 3, 64, 64), the size that the network takes."""
    if images.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    return F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)


def load_evaluator(path: Location | str, device: str | torch.device = "cpu") -> Evaluator:
    """Our safetensors or the course's checkpoint.pth ({"model": state_dict}, read with weights_only), by the suffix.

    Raises CheckpointError for a file that is neither.
    """
    path = Path(path) if isinstance(path, str) else path
    if path.suffix == ".pth" and isinstance(path, Path):
        evaluator = Evaluator(ICLEVR)
        state = _read_course_checkpoint(path)
    else:
        info, state = load(path)
        if info.kind != "evaluator":
            raise CheckpointError(path.name, f"holds a {info.kind}, not an evaluator")
        evaluator = Evaluator(Vocabulary(info.vocabulary), info)
    try:
        evaluator.resnet.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(path.name, f"weights do not fit ResNet-18: {_short(error)}") from error
    return evaluator.to(device).float().freeze()


def _read_course_checkpoint(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state: Mapping[str, Any] = content["model"]
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises a dozen kinds for a foreign file
        reason = f'not a checkpoint of the form {{"model": state_dict}}: {_short(error)}'
        raise CheckpointError(path.name, reason) from error
    return state


def _short(error: Exception) -> str:
    """One line of what torch says on many."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def write_course_checkpoint(evaluator: Evaluator, path: Path) -> None:
    """Writes {"model": state_dict}, which the course's unchanged evaluator.py loads as its checkpoint.pth."""
    state = {key: value.to("cpu").contiguous() for key, value in evaluator.resnet.state_dict().items()}
    torch.save({"model": state}, path)


@dataclass(frozen=True)
class PictureScore:
    """One picture's verdict. accuracy: hits / k, where k labels were asked and hits of them are among the top k."""

    accuracy: float
    hits: int
    k: int
    f1: float  # of the labels found (probability over 0.5) against those asked
    exact: bool  # the labels found are exactly those asked


@dataclass(frozen=True)
class SetScore:
    """A set of pictures. accuracy: sum of hits / sum of k, as the course's eval() counts."""

    accuracy: float
    exact_match: float  # share of pictures
    f1: float  # mean over pictures
    per_label_recall: dict[str, float]  # label -> share of the pictures it was asked of in which it is among the top k


def _top_k(probabilities: Tensor, targets: Tensor) -> Tensor:
    """(N, K) bool: the k most probable labels of each picture, k its number of true ones."""
    rank = probabilities.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < targets.sum(1, keepdim=True)


def score_pictures(probabilities: Tensor, targets: Tensor) -> list[PictureScore]:
    """Verdicts from probabilities (N, K) and multi-hot targets (N, K). Every row of targets has at least one label."""
    asked = targets > 0.5
    found = probabilities > THRESHOLD
    hits = (_top_k(probabilities, asked) & asked).sum(1).tolist()
    k = asked.sum(1).tolist()
    f1 = (2 * (found & asked).sum(1) / (found.sum(1) + asked.sum(1)).clamp(min=1)).tolist()
    exact = (found == asked).all(1).tolist()
    return [PictureScore(h / n, h, n, f, e) for h, n, f, e in zip(hits, k, f1, exact, strict=True)]


def score_set(probabilities: Tensor, targets: Tensor, names: Sequence[str]) -> SetScore:
    """The scores of a set, from probabilities (N, K) and multi-hot targets (N, K); N at least 1."""
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
