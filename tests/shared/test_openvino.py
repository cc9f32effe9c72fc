"""Networks in OpenVINO compared with torch's; that a row has the same bits in every batch; which engine is taken."""

import gc
import importlib.util
import math
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared import openvino
from shared.device import autocast_dtype
from shared.diffusion.denoise import sample
from shared.diffusion.model import CompiledDenoiser, CompiledUpsampler, load_denoiser
from shared.diffusion.unet import NetworkConfig, UNet
from shared.diffusion.upsampler import UpsamplerConfig, UpsamplerNet
from shared.evaluator import load_evaluator
from shared.openvino import CompiledNetwork, EngineError, uses_openvino
from shared.options import EngineName
from tests.paths import ROOT

COUNTS = [1, 2, 3, 5, 7, 13, 16, 37]  # of rows
# of the norm of what torch computes in float32: a bfloat16 is 2^-9 from its number at most
APART = 1e-5 if autocast_dtype(torch.device("cpu")) is None else 0.03

CONFIG: dict[str, Any] = {
    "num_labels": 5,
    "image_size": 16,
    "channels": (8, 16),
    "encoder_blocks": (1, 1),
    "decoder_blocks": (1, 2),
    "attention": (False, True),
    "head_channels": 8,
    "embedding": 16,
}


def randomized(network: nn.Module) -> Any:
    """Fill all weights with random values: a fresh network has zeros in places and ignores its labels."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return network.eval()


def inputs(count: int, places: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    labels = (torch.rand(count, 5, generator=generator) < 0.4).float()
    if places:
        labels = torch.cat([labels[..., None], torch.rand(count, 5, places, generator=generator)], -1)
    return x, torch.randint(0, 1000, (count,), generator=generator), labels, torch.arange(count) % 2 == 0


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is torch.float32
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) <= APART


@pytest.mark.parametrize(
    ("places", "changes"),
    [(0, {}), (0, {"conditioning": "channels"}), (2, {"positions": True}), (4, {"positions": True, "rotations": True})],
)
def test_a_denoising_network_is_torchs_and_no_row_depends_on_its_batch(places: int, changes: dict[str, object]) -> None:
    network: UNet = randomized(UNet(NetworkConfig(**{**CONFIG, **changes})))
    arguments, compiled = inputs(max(COUNTS), places), CompiledDenoiser(network)
    with torch.inference_mode():
        expected = network(*arguments)
    whole = compiled(*arguments)
    assert_close(whole, expected)
    for _ in range(2):  # while sizes load, and with all of them
        for count in COUNTS:
            assert torch.equal(compiled(*(one[-count:] for one in arguments)), whole[-count:]), f"{count} rows"
        wait()


def test_an_upsampler_is_torchs_and_no_picture_depends_on_its_batch() -> None:
    network: UpsamplerNet = randomized(UpsamplerNet(UpsamplerConfig(picture=(64, 48), channels=16)))
    x, compiled = torch.randn(max(COUNTS), 3, 16, 16), CompiledUpsampler(network, (3, 16, 16))
    with torch.inference_mode():
        expected = network(x)
    whole = compiled(x)
    assert_close(whole, expected)
    for _ in range(2):  # while sizes load, and with all of them
        for count in COUNTS:
            assert torch.equal(compiled(x[-count:]), whole[-count:]), f"{count} rows"
        wait()


def test_the_shipped_pictures_are_torchs_and_get_the_same_verdicts_alone_and_together() -> None:
    """A hundred pictures: the same objects are found in those of both engines, but for borderline ones."""
    denoiser = load_denoiser(ROOT / "models" / "iclevr-320x240.safetensors")
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(100, len(denoiser.vocabulary))
    for i, row in enumerate(labels):
        row[torch.randperm(len(row), generator=generator)[: 1 + i % 3]] = 1
    found = {}
    for engine in list[EngineName](["openvino", "torch"]):
        stepper = denoiser.stepper(engine=engine)
        judge = load_evaluator(ROOT / "models" / "iclevr-resnet18.safetensors", engine=engine)
        pictures = sample(stepper, labels, denoiser.options, range(100))
        found[engine] = pictures, judge.probabilities(pictures)
        if engine == "openvino":
            alone = sample(stepper, labels[41:42], denoiser.options, [41])
            assert torch.equal(alone[0], pictures[41])
            assert torch.equal(judge.probabilities(alone)[0], found[engine][1][41])
    (ours, of_ours), (torchs, of_torchs) = found["openvino"], found["torch"]
    assert (ours - torchs).abs().mean() <= 0.02  # of a range of 2
    assert ((of_ours > 0.5) == (of_torchs > 0.5)).all(1).sum() >= 97


def wait() -> None:
    """Wait until all sizes that were begun are loaded and kept."""
    for thread in threading.enumerate():
        if thread.name == openvino.LOADER:
            thread.join()


def load(folder: Path) -> CompiledNetwork:
    """Return a network that keeps what it compiles in `folder`, with sizes 1, 2 and 4."""
    torch.manual_seed(0)
    compiled = CompiledNetwork(nn.Linear(3, 2).eval(), [torch.randn(1, 3)], folder / "linear")
    for rows in (1, 4):
        compiled(torch.zeros(rows, 3))
    wait()
    return compiled


def test_a_network_that_gives_nan_gives_it_in_every_size() -> None:
    network = nn.Linear(3, 2).eval()
    nn.init.constant_(network.weight, math.nan)
    assert CompiledNetwork(network, [torch.randn(1, 3)])(torch.randn(5, 3))[0].isnan().all()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each compilation."""
    made, compile = list[int](), openvino._compile

    def counted(graph: Any, arguments: Sequence[Tensor]) -> Any:
        made.append(len(arguments[0]))
        return compile(graph, arguments)

    monkeypatch.setattr(openvino, "_compile", counted)
    return made


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path: Path, compilations: list[int]) -> None:
    x = torch.randn(4, 3)
    (expected,) = load(tmp_path)(x)
    assert sorted(compilations) == [1, 2, 4]
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.equal(load(tmp_path)(x)[0], expected)
    assert len(compilations) == 3


@pytest.mark.parametrize("change", ["THREADS", "autocast_dtype"])  # stand for all that the digest is of
def test_what_another_machine_or_version_kept_is_not_used(
    change: str, tmp_path: Path, compilations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path)
    compilations.clear()
    has_bf16 = autocast_dtype(torch.device("cpu")) is not None
    other = {"THREADS": openvino.THREADS + 1, "autocast_dtype": lambda device: None if has_bf16 else torch.bfloat16}
    openvino._made_by.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(openvino, change, other[change])
        load(tmp_path)
    openvino._made_by.cache_clear()
    assert sorted(compilations) == [1, 2, 4]


@pytest.mark.parametrize("damage", [b"", b"no network", "half"])
def test_a_damaged_file_is_replaced(damage: bytes | str, tmp_path: Path, compilations: list[int]) -> None:
    load(tmp_path)
    (file,) = tmp_path.glob("linear-2-*")  # the first size
    whole = file.read_bytes()
    file.write_bytes(damage if isinstance(damage, bytes) else whole[: len(whole) // 2])
    compilations.clear()
    load(tmp_path)
    assert compilations == [2]
    load(tmp_path)
    assert compilations == [2]


def test_a_disk_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    x = torch.randn(3, 3)
    assert torch.equal(load(tmp_path / "file")(x)[0], load(tmp_path / "folder")(x)[0])


class Kernel:
    """Stands for a compiled network that adds a half to each number, and rounds in another way for some sizes."""

    def __init__(self, rows: int, rounds: set[int], calls: list[int]) -> None:
        self.rows, self.error, self.calls = rows, 0.01 if rows in rounds else 0.0, calls

    def create_infer_request(self) -> "Kernel":
        return self

    def get_compiled_model(self) -> "Kernel":
        return self

    def infer(self, inputs: dict[int, Any], share_inputs: bool) -> dict[int, Any]:
        assert len(inputs[0]) == self.rows
        self.calls.append(self.rows)
        return {0: inputs[0] + (0.5 + self.error)}


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (set(), {1: [1], 3: [2, 1], 7: [8], 13: [8, 4, 1], 15: [8, 8], 19: [8, 8, 2, 1], 32: [8, 8, 8, 8]}),
        ({1, 8}, {1: [2], 3: [2, 2], 7: [4, 2, 2], 8: [4, 4], 9: [4, 4, 2]}),
        ({1, 4, 8}, {1: [2], 3: [2, 2], 9: [2, 2, 2, 2, 2]}),
    ],
)
def test_calls_have_little_padding_and_only_sizes_that_round_alike(
    rounds: set[int], expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[int]()
    monkeypatch.setattr(openvino, "_convert", lambda module, example: None)
    monkeypatch.setattr(openvino, "_compile", lambda graph, arguments: Kernel(len(arguments[0]), rounds, made))
    compiled = CompiledNetwork(nn.Identity(), [torch.zeros(1, 2)])
    for rows, calls in expected.items():
        compiled(torch.zeros(rows, 2))  # tries the sizes
        wait()
        made.clear()
        x = torch.randn(rows, 2)
        assert torch.equal(compiled(x)[0], x + 0.5)
        assert made == calls


def test_calls_do_not_wait_for_sizes_and_forget_those_that_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    made, may_compile, kernels = list[int](), threading.Event(), dict[int, weakref.ref[Kernel]]()

    def compile(graph: Any, arguments: Sequence[Tensor]) -> Kernel:
        rows = len(arguments[0])
        if rows != openvino.FIRST:
            assert may_compile.wait(60)
        kernel = Kernel(rows, {8}, made)
        kernels[rows] = weakref.ref(kernel)
        return kernel

    monkeypatch.setattr(openvino, "_convert", lambda module, example: None)
    monkeypatch.setattr(openvino, "_compile", compile)
    compiled, x = CompiledNetwork(nn.Identity(), [torch.zeros(1, 2)]), torch.randn(9, 2)
    assert torch.equal(compiled(x)[0], x + 0.5)
    assert made == [2, 2, 2, 2, 2]
    may_compile.set()
    wait()
    made.clear()
    assert torch.equal(compiled(x)[0], x + 0.5)
    assert made == [4, 4, 1]
    gc.collect()
    assert {rows for rows, kernel in kernels.items() if kernel() is not None} == {1, 2, 4}


def test_the_engine_is_openvino_on_a_cpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (uses_openvino("auto", cpu), uses_openvino("openvino", cpu), uses_openvino("torch", cpu)) == (
        True,
        True,
        False,
    )
    assert (uses_openvino("auto", gpu), uses_openvino("torch", gpu)) == (False, False)
    with pytest.raises(EngineError, match="on a CPU, not on cuda"):
        uses_openvino("openvino", gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not uses_openvino("auto", cpu)
    with pytest.raises(EngineError, match="not installed"):
        uses_openvino("openvino", cpu)
