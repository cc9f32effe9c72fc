"""Networks in OpenVINO compared with torch's; that a row has the same bits in every batch; which engine is taken."""

import importlib.util
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
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
from shared.openvino import ALONE, STREAMS, CompiledNetwork, EngineError, Size, uses_openvino
from shared.options import EngineName
from tests.paths import ROOT
from tests.toy_checkpoint import SHAPE, randomize

COUNTS = [1, 2, 3, 5, 7, 13, 16, 37]  # of rows
# of the norm of what torch computes in float32: a bfloat16 is 2^-9 from its number at most
APART = 1e-5 if autocast_dtype(torch.device("cpu")) is None else 0.03


def inputs(count: int, places: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    labels = (torch.rand(count, 5, generator=generator) < 0.4).float()
    if places:
        labels = torch.cat([labels[..., None], torch.rand(count, 5, places, generator=generator)], -1)
    return x, torch.randint(0, 1000, (count,), generator=generator), labels, torch.arange(count) % 2 == 0


def assert_close_in_any_batch(compiled: Callable[..., Tensor], arguments: Sequence[Tensor], expected: Tensor) -> None:
    whole = compiled(*arguments)
    assert whole.dtype is torch.float32
    assert whole.shape == expected.shape
    assert float((whole - expected).norm() / expected.norm()) <= APART
    for _ in range(2):  # while sizes load, and with all of them
        for count in COUNTS:
            assert torch.equal(compiled(*(one[-count:] for one in arguments)), whole[-count:]), f"{count} rows"
        wait()


@pytest.mark.parametrize(
    ("places", "changes"),
    [(0, {}), (0, {"conditioning": "channels"}), (2, {"positions": True}), (4, {"positions": True, "rotations": True})],
)
def test_a_denoising_network_is_torchs_and_no_row_depends_on_its_batch(places: int, changes: dict[str, object]) -> None:
    network = UNet(NetworkConfig(num_labels=5, **SHAPE, **changes)).eval()
    randomize(network, 0, std=0.2)
    arguments, compiled = inputs(max(COUNTS), places), CompiledDenoiser(network)
    with torch.inference_mode():
        expected = network(*arguments)
    assert_close_in_any_batch(compiled, arguments, expected)


def test_an_upsampler_is_torchs_and_no_picture_depends_on_its_batch() -> None:
    network = UpsamplerNet(UpsamplerConfig(picture=(64, 48), channels=16)).eval()
    randomize(network, 0, std=0.05)
    x, compiled = torch.randn(max(COUNTS), 3, 16, 16), CompiledUpsampler(network, (3, 16, 16))
    with torch.inference_mode():
        expected = network(x)
    assert_close_in_any_batch(compiled, (x,), expected)


def test_the_shipped_pictures_are_torchs_and_get_the_same_verdicts_alone_and_together() -> None:
    """The same objects are found in those of both engines, but for borderline ones."""
    denoiser = load_denoiser(ROOT / "models" / "iclevr-320x240.safetensors")
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(12, len(denoiser.vocabulary))
    for i, row in enumerate(labels):
        row[torch.randperm(len(row), generator=generator)[: 1 + i % 3]] = 1
    found = {}
    for engine in list[EngineName](["openvino", "torch"]):
        stepper = denoiser.stepper(engine=engine)
        judge = load_evaluator(ROOT / "models" / "iclevr-resnet18.safetensors", engine=engine)
        pictures = sample(stepper, labels, denoiser.options, range(12))
        found[engine] = pictures, judge.probabilities(pictures)
        if engine == "openvino":
            alone = sample(stepper, labels[11:12], denoiser.options, [11])
            assert torch.equal(alone[0], pictures[11])
            assert torch.equal(judge.probabilities(alone)[0], found[engine][1][11])
    (ours, of_ours), (torchs, of_torchs) = found["openvino"], found["torch"]
    assert (ours - torchs).abs().mean() <= 0.02  # of a range of 2
    assert ((of_ours > 0.5) == (of_torchs > 0.5)).all(1).sum() >= 11


def wait() -> None:
    """Wait until all sizes that were begun are loaded and kept."""
    for thread in threading.enumerate():
        if thread.name == openvino.LOADER:
            thread.join()


# rows that every stream gets, so that all sizes are loaded
ROWS = [1, STREAMS, 2 * STREAMS, 4 * STREAMS]
LOADED = sorted({ALONE, *openvino.SHARED})


def load(folder: Path) -> CompiledNetwork:
    """Return a network that keeps what it compiles in `folder`, with all sizes."""
    torch.manual_seed(0)
    compiled = CompiledNetwork(nn.Linear(3, 2).eval(), [torch.randn(1, 3)], folder / "linear")
    for rows in ROWS:
        compiled(torch.zeros(rows, 3))
    wait()
    return compiled


def test_a_network_that_gives_nan_gives_it_in_every_size() -> None:
    network = nn.Linear(3, 2).eval()
    nn.init.constant_(network.weight, math.nan)
    assert CompiledNetwork(network, [torch.randn(1, 3)])(torch.randn(5, 3))[0].isnan().all()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Size]:
    """The sizes that were compiled."""
    made, compile = list[Size](), openvino._compile

    def counted(graph: Any, arguments: Sequence[Tensor], streams: int, exact: bool) -> Any:
        made.append(Size(len(arguments[0]), streams))
        return compile(graph, arguments, streams, exact)

    monkeypatch.setattr(openvino, "_compile", counted)
    return made


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path: Path, compilations: list[Size]) -> None:
    x = torch.randn(4 * STREAMS, 3)
    (expected,) = load(tmp_path)(x)
    assert sorted(compilations) == LOADED
    assert len(list(tmp_path.iterdir())) == len(LOADED)
    compilations.clear()
    assert torch.equal(load(tmp_path)(x)[0], expected)
    assert compilations == []


@pytest.mark.parametrize("change", ["THREADS", "autocast_dtype"])  # stand for all that the digest is of
def test_what_another_machine_or_version_kept_is_replaced(
    change: str, tmp_path: Path, compilations: list[Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path)
    before = set(tmp_path.iterdir())
    compilations.clear()
    has_bf16 = autocast_dtype(torch.device("cpu")) is not None
    other = {"THREADS": openvino.THREADS + 1, "autocast_dtype": lambda device: None if has_bf16 else torch.bfloat16}
    openvino._made_by.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(openvino, change, other[change])
        load(tmp_path)
    openvino._made_by.cache_clear()
    assert sorted(compilations) == LOADED
    assert len(list(tmp_path.iterdir())) == len(LOADED)
    assert not before & set(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", "half"])
def test_a_damaged_file_is_replaced(damage: bytes | str, tmp_path: Path, compilations: list[Size]) -> None:
    load(tmp_path)
    (file,) = tmp_path.glob("linear-1x1-*")  # the first size
    whole = file.read_bytes()
    file.write_bytes(damage if isinstance(damage, bytes) else whole[: len(whole) // 2])
    compilations.clear()
    for _ in range(2):
        load(tmp_path)
        assert compilations == [ALONE]


def test_a_disk_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    x = torch.randn(3, 3)
    assert torch.equal(load(tmp_path / "file")(x)[0], load(tmp_path / "folder")(x)[0])


class Kernel:
    """Stands for a compiled network that adds a half to each number, and for four rows rounds in another way.

    It is its own request, which computes when somebody waits for it.
    """

    def __init__(self, size: Size, calls: list[Size]) -> None:
        self.size, self.added, self.calls = size, 0.51 if size.rows == 4 else 0.5, calls

    def create_infer_request(self) -> "Kernel":
        return Kernel(self.size, self.calls)

    def start_async(self, inputs: dict[int, Any], *, share_inputs: bool = False) -> None:
        assert len(inputs[0]) == self.size.rows
        self.inputs = inputs[0]
        self.calls.append(self.size)

    def wait(self) -> None:
        self.output_tensors = [SimpleNamespace(data=self.inputs + self.added)]

    def infer(self, inputs: dict[int, Any]) -> None:
        self.start_async(inputs)
        self.wait()


@pytest.mark.parametrize(("most", "calls"), [(4, {2: 4, 1: 1}), (1, {1: 9})])
def test_calls_do_not_wait_for_sizes_and_leave_out_those_that_round_otherwise(
    most: int, calls: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with two threads."""
    made, may_compile = list[Size](), threading.Event()

    def compile(graph: Any, arguments: Sequence[Tensor], streams: int, exact: bool) -> Kernel:
        size = Size(len(arguments[0]), streams)
        assert size == ALONE or may_compile.wait(60)
        return Kernel(size, made)

    monkeypatch.setattr(openvino, "STREAMS", 2)
    monkeypatch.setattr(openvino, "SHARED", tuple(Size(rows, 2) for rows in (4, 2, 1)))
    monkeypatch.setattr(openvino, "_convert", lambda module, example: None)
    monkeypatch.setattr(openvino, "_compile", compile)
    compiled, x = CompiledNetwork(nn.Identity(), [torch.zeros(1, 2)], most=most), torch.randn(9, 2)
    assert torch.equal(compiled(x)[0], x + 0.5)
    assert made == [ALONE] * 9
    may_compile.set()
    wait()
    made.clear()
    assert torch.equal(compiled(x)[0], x + 0.5)
    assert Counter(made) == {Size(rows, 2): count for rows, count in calls.items()}


def test_the_engine_is_openvino_on_a_cpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [uses_openvino(name, cpu) for name in list[EngineName](["auto", "openvino", "torch"])] == [True, True, False]
    assert (uses_openvino("auto", gpu), uses_openvino("torch", gpu)) == (False, False)
    with pytest.raises(EngineError, match="on a CPU, not on cuda"):
        uses_openvino("openvino", gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not uses_openvino("auto", cpu)
    with pytest.raises(EngineError, match="not installed"):
        uses_openvino("openvino", cpu)
