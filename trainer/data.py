"""Data sets as tensors (pictures, multi-hot labels, positions): read, merged, checked, fitted to a run's settings."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from rich.progress import Progress
from torch import Tensor

from shared import storage as files
from shared.diffusion.inputs import INPUTS, unknown, with_inputs
from shared.diffusion.layouts import OUTSIDE, as_rotations, with_positions
from shared.diffusion.model import Denoiser
from shared.vocabulary import Vocabulary, read_train_file
from trainer.config import Fit, Share, TrainConfig
from trainer.data_folder import Pictures, pictures_folder, read_picture
from trainer.errors import TrainerError
from trainer.joined import Joined, chunks

DECODED_AT_ONCE = 1024  # pictures
MEASURED = 2048  # pictures whose deviation stands for all
Size = tuple[FiniteFloat, FiniteFloat]
Position = tuple[Share, Share]
Rotation = Share | None
UNLIKE = "differ in proportions, so padding gives them different borders; squeeze them (--set fit=squeeze)"


@dataclass(frozen=True)
class Dataset:
    vocabulary: Vocabulary
    images: Tensor | Joined  # (N, 3, S, S) uint8, mapped from files where they can be
    labels: Tensor  # (N, K) float32 multi-hot
    positions: Tensor | None = None  # (N, K, 2) float32, as in `shared/diffusion/layouts.py`, if the folder has some
    rotations: Tensor | None = None  # (N, K, 2) float32, as in `shared/diffusion/layouts.py`, if the folder has some
    aspect: float = 1.0  # width over height of the pictures before they were padded to squares; 1 where squeezed
    object_size: float | None = None  # median side of an object as a fraction of the picture's, if the folder says it
    typical: Tensor | None = None  # (N,) bool: the pictures whose layouts the layout network learns; None for all
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # picture-wide ones: (N, numbers) float32, NaN unknown

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """A hash of all data that a run learns from, so that it is not resumed with other data."""
        found = hashlib.sha256(f"{self.vocabulary.names} {self.aspect}".encode())
        for chunk in chunks(self.images, DECODED_AT_ONCE):
            found.update(chunk.contiguous().numpy().data)
        for tensor in (self.labels, self.positions, self.rotations, *self.inputs.values()):
            if tensor is not None:
                found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()


def pad(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat the edge rows (or columns) of (N, H, W, C) until pictures are square, with the original in the middle."""
    missing = [max(pictures.shape[1:3]) - side for side in pictures.shape[1:3]]
    border = [(0, 0), *((pixels // 2, pixels - pixels // 2) for pixels in missing), (0, 0)]
    return np.pad(pictures, border, mode="edge")


def to_square(picture: Image.Image, size: int, fit: Fit) -> Image.Image:
    """Return an RGB picture size x size: scaled as it is, or padded first."""
    if fit == "pad" and picture.width != picture.height:
        picture = Image.fromarray(pad(np.asarray(picture)[None])[0])
    return picture.resize((size, size), Image.Resampling.BILINEAR)


class _Decoder:
    """Decodes pictures of a folder to (N, 3, S, S) uint8."""

    def __init__(self, folder: Path, names: list[str], size: int, fit: Fit, advance: Callable[[int], None]) -> None:
        self.folder, self.names, self.size, self.fit, self.advance = folder, names, size, fit, advance
        self.aspects = set[float]()

    def _one(self, name: str) -> NDArray[np.uint8]:
        picture = read_picture(self.folder / name)
        self.aspects.add(picture.width / picture.height)
        self.advance(1)
        return np.asarray(to_square(picture, self.size, self.fit)).transpose(2, 0, 1)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the pictures in order, some at a time. TrainerError if they cannot be padded alike."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self.names), DECODED_AT_ONCE):
                yield np.stack(list(pool.map(self._one, self.names[start : start + DECODED_AT_ONCE])))
                if self.fit == "pad" and len(self.aspects) > 1:
                    raise TrainerError(f"{self.folder}: pictures {UNLIKE}")


def _write_cache(path: Path, decoder: _Decoder) -> None:
    """Decode pictures into a file of NumPy's, without ever holding all of them in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(decoder.names), 3, decoder.size, decoder.size)}
    with files.replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in decoder.chunks():
            file.write(chunk.tobytes())


def _key(folder: Path, names: list[str]) -> str:
    """Return the cache's name: a hash of the pictures' names, modification times and sizes.

    Archives may give all files one time.
    """
    found = hashlib.sha256()
    for name in names:
        try:
            status = (folder / name).stat()
            found.update(f"{name} {status.st_mtime_ns} {status.st_size}\n".encode())
        except (OSError, ValueError) as error:
            raise TrainerError(f"{folder / name}: cannot be read as a picture ({error})") from error
    return found.hexdigest()[:12]


def load_dataset(
    folder: Path, *, size: int, fit: Fit = "squeeze", advance: Callable[[int], None] = lambda _: None
) -> Dataset:
    """Read objects.json, train.json and its pictures; cache the decoded pictures in `folder/.cache` if it is writable.

    `advance(n)` reports progress. Raises LabelError for a bad label file, TrainerError for a missing or broken picture,
    and for the folder that data sets are in.
    """
    if not (folder / "objects.json").exists() and (inside := sorted(folder.glob("*/objects.json"))):
        raise TrainerError(f"{folder} is no data set, but {inside[0].parent} is one")
    vocabulary = Vocabulary.from_objects_file(folder / "objects.json")
    train = read_train_file(folder / "train.json", vocabulary)
    if not train:
        raise TrainerError(f"{folder / 'train.json'} names no pictures")
    names, pictures = list(train), pictures_folder(folder, next(iter(train)))
    cache = folder / ".cache" / f"{size}-{fit}-{_key(pictures, names)}.npy"
    decoder = _Decoder(pictures, names, size, fit, advance)
    # mapped, not read: processes share the pages, and pictures that do not fit into memory come from the disk
    read = partial(np.load, cache, mmap_mode="c")
    try:
        images = read()
    except (OSError, ValueError, EOFError):  # there is none, or it is damaged
        try:
            _write_cache(cache, decoder)
            for former in set(cache.parent.glob(f"{size}-{fit}-*.npy")) - {cache}:
                former.unlink()
            images = read()
        except OSError:  # a read-only folder or a full disk: they are kept in memory, and decoded again next time
            images = np.concatenate(list(decoder.chunks()))
    labels = torch.tensor([vocabulary.multi_hot(train[name]) for name in names], dtype=torch.float32)
    positions = read_positions(folder / "positions.json", train, vocabulary)
    rotations = read_rotations(folder / "rotations.json", train, vocabulary)
    inputs = {name: read_input(path, name, train) for name in INPUTS if (path := folder / f"{name}.json").exists()}
    dataset = Dataset(vocabulary, torch.from_numpy(images), labels, positions, rotations, inputs=inputs)
    if fit == "squeeze":
        return replace(dataset, object_size=read_object_size(folder))
    width, height = read_picture(pictures / names[0]).size
    if positions is not None:
        positions = _padded(positions, width, height)
    return replace(dataset, positions=positions, aspect=width / height)


def read_folders(folders: Sequence[Path], progress: Progress, *, size: int, fit: Fit = "squeeze") -> Dataset:
    """Load data set folders as one, with their progress shown. Raises as `load_dataset` and `merge`."""
    datasets = []
    for folder in folders:
        task = progress.add_task(f"reading {folder}", total=None)
        dataset = load_dataset(folder, size=size, fit=fit, advance=partial(progress.advance, task))
        progress.update(task, total=len(dataset), completed=len(dataset))
        datasets.append(dataset)
    return merge(datasets)


def read_positions(path: Path, train: Mapping[str, Sequence[str]], vocabulary: Vocabulary) -> Tensor | None:
    """Read positions.json, which maps each picture to the [x, y] of its labels in train.json's order.

    Returns (N, K, 2) float32 with `OUTSIDE` for absent labels, or None where there is no such file. TrainerError for
    one that cannot be used.
    """
    if not path.exists():
        return None
    positions = torch.full((len(train), len(vocabulary), 2), OUTSIDE)
    for i, label, point in _entries(path, Position, "[x, y], fractions of width and height", train, vocabulary):
        positions[i, label] = torch.tensor(point)
    return positions


def read_rotations(path: Path, train: Mapping[str, Sequence[str]], vocabulary: Vocabulary) -> Tensor | None:
    """Read rotations.json, which maps each picture to the rotations of its labels' objects in train.json's order.

    A rotation is a fraction of the smallest turn after which the object looks the same, 0 to 1, or null where none is
    to be seen. Returns (N, K, 2) float32, see `as_rotations`, or None where there is no such file. TrainerError for one
    that cannot be used.
    """
    if not path.exists():
        return None
    turns = torch.full((len(train), len(vocabulary)), math.nan)
    for i, label, turn in _entries(path, Rotation, "rotation, a fraction of a turn or null", train, vocabulary):
        turns[i, label] = math.nan if turn is None else turn
    return as_rotations(turns)


def read_input(path: Path, name: str, train: Mapping[str, Sequence[str]]) -> Tensor:
    """Read the file of a picture-wide input, which maps each picture to its numbers, or to a single one.

    Returns (N, numbers) float32, NaN for a picture that is missing or null. TrainerError for a file that is no such.
    """
    numbers = INPUTS[name].numbers
    try:
        content = TypeAdapter(dict[str, list[FiniteFloat] | FiniteFloat | None]).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise TrainerError(f"{path}: {first['msg']} (at {', '.join(map(str, first['loc']))})") from error
    values = torch.full((len(train), numbers), math.nan)
    for i, picture in enumerate(train):
        if (given := content.get(picture)) is not None:
            row = torch.tensor(given if isinstance(given, list) else [given])
            if len(row) != numbers:
                raise TrainerError(f'{path}: picture "{picture}" has {len(row)} numbers; {name} takes {numbers}')
            values[i] = row
    return values


def _entries(
    path: Path, kind: Any, what: str, train: Mapping[str, Sequence[str]], vocabulary: Vocabulary
) -> Iterator[tuple[int, int, Any]]:
    """Read a file that maps each picture to its objects' entries; yield picture, label and entry of each object."""
    content = _read_lists(path, kind, what)
    for i, (name, labels) in enumerate(train.items()):
        if len(content.get(name, ())) != len(labels):
            raise TrainerError(f'{path}: picture "{name}" needs one for each of its {len(labels)} labels: {what}')
        for label, entry in zip(labels, content[name], strict=True):
            yield i, vocabulary.index(label), entry


def _read_lists(path: Path, kind: Any, what: str) -> dict[str, list[Any]]:
    """Read a file that maps each picture to a list; `kind` is the type of what the list holds, `what` its name."""
    try:
        return TypeAdapter(dict[str, list[kind]]).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        at = ", ".join(map(str, first["loc"]))  # the picture and which of its entries
        raise TrainerError(f"{path}: {first['msg']} (at {at}); it lists each picture's {what}") from error


def read_object_size(folder: Path) -> float | None:
    """Return the median of sqrt(width x height) in sizes.json, which `trainer import` writes; None without the file."""
    path = folder / "sizes.json"
    if not path.exists():
        return None
    sizes = _read_lists(path, Size, "[width, height]")
    sides = [math.sqrt(max(0.0, width * height)) for pairs in sizes.values() for width, height in pairs]
    return statistics.median(sides) if sides else None


def read_arrangements(folders: Sequence[Path], vocabulary: Vocabulary) -> Tensor:
    """Read the positions (N, K, 2) of the pictures whose number of objects no earlier folder has.

    The folders need a train.json and a positions.json, and no pictures.
    """
    found = list[Tensor]()
    for folder in folders:
        train = read_train_file(folder / "train.json", vocabulary)
        if (positions := read_positions(folder / "positions.json", train, vocabulary)) is None:
            raise TrainerError(f"{folder} has no positions.json")
        found.append(positions)
    first = first_of_their_number([(positions[..., 0] != OUTSIDE).sum(1) for positions in found])
    return torch.cat(found)[first]


def first_of_their_number(counts: Sequence[Tensor]) -> Tensor:
    """Return which pictures of several folders show a number of objects that no earlier folder has, given `counts`."""
    first, seen = list[Tensor](), torch.empty(0)
    for numbers in counts:
        first.append(~torch.isin(numbers, seen))
        seen = torch.cat([seen, numbers])
    return torch.cat(first)


def _padded(positions: Tensor, width: int, height: int) -> Tensor:
    """Convert fractions of a width x height picture to fractions of the square that `to_square` pads it to."""
    side = max(width, height)
    inside = (positions * torch.tensor([width, height]) + torch.tensor([side - width, side - height]) // 2) / side
    return inside.where(positions != OUTSIDE, positions)


def rotations_of(config: TrainConfig, dataset: Dataset) -> Tensor | None:
    """Return the data set's rotations if it has some, and the run gives them and the positions to its network."""
    return None if positions_of(config, dataset) is None or not config.rotations else dataset.rotations


def positions_of(config: TrainConfig, dataset: Dataset) -> Tensor | None:
    """Return the data set's positions if it has some and the run gives them to its network."""
    return dataset.positions if config.positions else None


def merge(datasets: list[Dataset]) -> Dataset:
    """Merge several folders' data sets, with the labels of the first.

    Raises TrainerError for those that cannot be learned from together, and as `in_vocabulary`.

    The layouts of n objects are learnt from the first folder that has pictures of n objects. So further folders widen
    what may be asked for, and do not change what is drawn where nothing more is asked.
    """
    if len(datasets) == 1:
        return datasets[0]
    own = datasets[0].vocabulary
    datasets = [in_vocabulary(dataset, own, "the first folder's objects.json") for dataset in datasets]
    check_alike(datasets)
    first, positions = datasets[0], [d.positions for d in datasets if d.positions is not None]
    rotations = [torch.zeros(*d.labels.shape, 2) if d.rotations is None else d.rotations for d in datasets]  # unknown
    turned = any(d.rotations is not None for d in datasets)
    typical = first_of_their_number([dataset.labels.sum(1) for dataset in datasets])
    return Dataset(
        first.vocabulary, Joined([d.images for d in datasets]), torch.cat([d.labels for d in datasets]),
        torch.cat(positions) if positions else None, torch.cat(rotations) if turned else None, first.aspect,
        first.object_size, typical, _merged_inputs(datasets),
    )  # fmt: skip


def _merged_inputs(datasets: Sequence[Dataset]) -> dict[str, Tensor]:
    """Return the inputs that any of the data sets has; they are unknown for the pictures of the others."""
    names = dict.fromkeys(name for dataset in datasets for name in dataset.inputs)
    return {name: torch.cat([d.inputs.get(name, unknown([name], len(d))[name]) for d in datasets]) for name in names}


def named(labels: Sequence[str], most: int = 3) -> str:
    """Name labels in a message: the first ones, and how many more there are."""
    return ", ".join(labels[:most]) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def in_vocabulary(dataset: Dataset, vocabulary: Vocabulary, model: str) -> Dataset:
    """Return the data set with the labels of a model's `vocabulary`, in their order.

    TrainerError, which names the `model`, if a picture shows a label that it does not know.
    """
    if dataset.vocabulary == vocabulary:
        return dataset
    names = dataset.vocabulary.names
    if unknown := [names[i] for i in dataset.labels.any(0).nonzero()[:, 0] if names[i] not in vocabulary]:
        raise TrainerError(f"{model} does not know labels of the folder: {named(unknown)}")
    known = [name for name in names if name in vocabulary]

    def moved(values: Tensor, absent: float) -> Tensor:
        out = torch.full((len(values), len(vocabulary), *values.shape[2:]), absent)
        out[:, vocabulary.encode(known)] = values[:, dataset.vocabulary.encode(known)]
        return out

    positions = None if dataset.positions is None else moved(dataset.positions, OUTSIDE)
    rotations = None if dataset.rotations is None else moved(dataset.rotations, 0.0)
    return replace(
        dataset, vocabulary=vocabulary, labels=moved(dataset.labels, 0.0), positions=positions, rotations=rotations
    )


def labelled(dataset: Dataset) -> Dataset:
    """Return the pictures whose labels are known."""
    known = dataset.labels.any(1)
    maybe = (dataset.positions, dataset.rotations, dataset.typical)
    positions, rotations, typical = (None if part is None else part[known] for part in maybe)
    return replace(
        dataset, images=Joined([dataset.images], known.nonzero()[:, 0]), labels=dataset.labels[known],
        positions=positions, rotations=rotations, typical=typical,
        inputs={name: values[known] for name, values in dataset.inputs.items()},
    )  # fmt: skip


def settled(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Return `config` with the fields that follow from the data, unless they are set.

    The noise levels that decide what a picture shows are those where the noise is about as strong as the pictures
    differ, so log_snr_mean falls with the logarithm of their variance. In a picture of more pixels the same noise hides
    less, since neighbours repeat each other: log_snr_mean also falls by 2 log(size / 64) (Hoogeboom et al. 2023, eq.
    8). Sampling's spacing does not follow: it covers these levels already (docs/dev/decisions.md). A batch is an eighth
    of the pictures, 8 to 64.
    """
    deviation = max(pixel_deviation(dataset.images), 1e-3)
    usual = TrainConfig()
    shift = 2 * math.log(deviation / usual.sigma_data) + 2 * math.log(config.image_size / usual.image_size)
    found = {"sigma_data": round(deviation, 3), "log_snr_mean": round(usual.log_snr_mean - shift, 1)}
    found["batch"] = min(usual.batch, max(8, len(dataset) // 8))
    return config.model_copy(update={key: value for key, value in found.items() if key not in config.model_fields_set})


def pixel_deviation(images: Tensor | Joined) -> float:
    """Return the root mean square difference of (N, C, S, S) uint8 from their mean picture, for values in [-1, 1]."""
    some = images[torch.linspace(0, len(images) - 1, min(len(images), MEASURED)).long()].float() / 127.5
    return float((some - some.mean(0)).square().mean().sqrt())


def check_labelled(dataset: Dataset, which: str) -> None:
    """Raise TrainerError if none of the pictures, `which` in the message, has labels."""
    if not dataset.labels.any():
        raise TrainerError(f"none of the {which} has labels: every list in their train.json is empty")


def check_alike(datasets: Sequence[Dataset]) -> None:
    """Raise TrainerError for data sets that one network cannot learn from."""
    first = datasets[0]
    if len({d.positions is None for d in datasets}) > 1:
        raise TrainerError(
            "only some folders have a positions.json; write the others' (`trainer import`), or remove them"
        )
    if any(other.aspect != first.aspect for other in datasets[1:]):
        raise TrainerError(f"the folders' pictures {UNLIKE}")


def as_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_all(pictures: Pictures, index: Tensor) -> Tensor:
    """Read these pictures: (N, 3, H, W) uint8."""
    return torch.stack([as_tensor(pictures.read(i)) for i in index.tolist()])


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1], channels last."""
    return images.to(torch.float32).div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def layouts_of(dataset: Dataset, base: Denoiser) -> Tensor:
    """Return the data set's labels as the denoiser takes them: with positions, rotations and inputs, or without."""
    names = base.network.config.inputs
    inputs = unknown(names, len(dataset)) | {name: dataset.inputs[name] for name in names if name in dataset.inputs}
    if base.layouts is None:
        return with_inputs(dataset.labels, inputs, names)
    if dataset.positions is None:
        raise TrainerError(f"{base.info.name} takes positions; write the data set's with `trainer import`")
    rotations = dataset.rotations
    if rotations is None and base.network.config.rotations:
        rotations = torch.zeros_like(dataset.positions)  # unknown
    rotations = rotations if base.network.config.rotations else None
    return with_inputs(with_positions(dataset.labels, dataset.positions, rotations), inputs, names)
