"""Runs torch networks in OpenVINO on a CPU: converts a module, compiles it for a few batch sizes, and calls it.

A row has the same bits in every batch. OpenVINO's threads do not wait for each other at every layer as torch's do, so
other processes on the machine slow a call down only by the cores that they take.
"""

from __future__ import annotations

import importlib.util
import io
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from shared import storage
from shared.device import THREADS, autocast_dtype
from shared.options import EngineName

SIZES: Final = (8, 4, 2, 1)  # rows of a call; larger calls are hardly faster a row (docs/decisions.md)
FIRST: Final = 2  # the size that a network begins with, and whose bits the others must have
MOST_PADDING: Final = 1 / 8  # of a call: two smaller calls cost less than one with more padding
TORCH_THREADS: Final = 1  # beside OpenVINO: torch's others would spin on the cores that it needs
LOADER: Final = "openvino"  # name of the threads that compile and keep networks

_converting = threading.Lock()  # warnings are ignored in all threads at once


class EngineError(ValueError):
    """An engine that this machine does not have."""


def uses_openvino(engine: EngineName, device: torch.device) -> bool:
    """Whether networks on `device` run in OpenVINO: with `auto`, on a CPU where it is installed.

    Raises EngineError for `openvino` without the package, or on a GPU.
    """
    if engine == "torch":
        return False
    is_cpu, is_installed = device.type == "cpu", importlib.util.find_spec("openvino") is not None
    if engine == "openvino" and not is_cpu:
        raise EngineError(f"OpenVINO runs networks on a CPU, not on {device}; use auto or torch")
    if engine == "openvino" and not is_installed:
        raise EngineError("the package openvino is not installed; install it, or use auto or torch")
    return is_cpu and is_installed


class CompiledNetwork:
    """A torch module as OpenVINO computes it, in bfloat16 if the CPU multiplies it, otherwise in float32.

    `module`: in eval mode and on the CPU, with weights that no longer change; its arguments and results are tensors
    whose first dimension is the batch. `example`: typical arguments for one row, of the shapes that every call has.
    `kept`: begins the names of files that keep what is compiled, so that it loads faster the next time; the folder is
    the checkpoint's own. Sizes other than FIRST are compiled in threads once calls could use them. Until then others
    take their place. Only one thread may call it at a time.
    """

    def __init__(self, module: nn.Module, example: Sequence[Tensor], kept: Path | None = None) -> None:
        self._module, self._example, self._kept = module, example, kept
        self._requests = dict[int, Any]()  # by size, each with its compiled network
        self._begun = {FIRST}  # sizes
        compiled, is_new = self._load(FIRST)
        self._requests[FIRST] = compiled.create_infer_request()
        if is_new:
            threading.Thread(target=self._keep, args=(FIRST, compiled), name=LOADER).start()

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Compute any number of rows, at least one; return the module's results, as float32."""
        parts, start, rows = [], 0, len(arguments[0])
        while start < rows:
            size = self._next_size(rows - start)
            parts.append(self._call(size, [one[start : start + size] for one in arguments]))
            start += size
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    def _next_size(self, left: int) -> int:
        """Return the largest loaded size that so many rows fill, or nearly fill; begin to load larger ones."""
        for size in SIZES:
            if left >= size * (1 - MOST_PADDING):
                if size in self._requests:
                    return size
                if size not in self._begun:
                    self._begun.add(size)
                    threading.Thread(target=self._add, args=(size,), name=LOADER).start()
        return FIRST

    def _call(self, size: int, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Compute at most `size` rows. Those that fill the call up are discarded."""
        rows = len(arguments[0])
        filled = [torch.cat([one, one[:1].expand(size - rows, *one.shape[1:])]) for one in arguments]
        return [result[:rows] for result in _infer(self._requests[size], filled)]

    def _add(self, size: int) -> None:
        """Load and keep a size, unless a row has other bits in it, which depends on the CPU."""
        compiled, is_new = self._load(size)
        if is_new and not self._has_bits(compiled, size):
            return
        self._requests[size] = compiled.create_infer_request()
        if is_new:
            self._keep(size, compiled)

    def _has_bits(self, compiled: Any, size: int) -> bool:
        """Whether a row has the same bits in calls of this size and of the first."""
        first = self._requests[FIRST].get_compiled_model()
        found, expected = (
            _infer(network.create_infer_request(), self._rows(count))
            for network, count in ((compiled, size), (first, FIRST))
        )
        return all(_same_bits(a, b[:1].expand_as(a)) for a, b in zip(found, expected, strict=True))

    def _rows(self, count: int) -> list[Tensor]:
        """Return arguments for so many equal rows."""
        return [one.expand(count, *one.shape[1:]) for one in self._example]

    def _load(self, size: int) -> tuple[Any, bool]:
        """Return the network for calls of this size, and whether it is new: compiled now, and not kept before."""
        if self._kept is not None:
            with suppress(OSError, RuntimeError):  # absent, or damaged
                return _core().import_model(_file(self._kept, size).read_bytes(), "CPU"), False
        return _compile(self._graph, self._rows(size)), True

    def _keep(self, size: int, compiled: Any) -> None:
        if self._kept is None:
            return
        content = io.BytesIO()
        with suppress(OSError):  # a full or read-only disk costs the next start some seconds
            compiled.export_model(content)
            storage.write(_file(self._kept, size), content.getbuffer())

    @cached_property
    def _graph(self) -> Any:
        return _convert(self._module, self._example)


def _file(kept: Path, size: int) -> Path:
    return kept.with_name(f"{kept.name}-{size}-{_made_by()}.openvino")


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


@cache
def _made_by() -> str:
    """Return a digest of what decides how weights are compiled: libraries, this CPU, and our own code."""
    import openvino

    cpu = [str(_core().get_property("CPU", name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    digest = blake2b(repr([openvino.__version__, torch.__version__, cpu, _properties()]).encode(), digest_size=8)
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _properties() -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if autocast_dtype(torch.device("cpu")) else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": THREADS,
        "ENABLE_CPU_PINNING": False,  # other processes may have the core that a pinned thread waits for
    }


def _convert(module: nn.Module, example: Sequence[Tensor]) -> Any:
    """Return the graph of a module: what `openvino.convert_model` does, without the checks that take it ten seconds."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with _converting, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer warns of every Python condition that it fixes
        traced = TorchScriptPythonDecoder(module, example_input=tuple(example), trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(traced))


def _compile(graph: Any, arguments: Sequence[Tensor]) -> Any:
    """Return the graph compiled for arguments of these shapes."""
    own = graph.clone()
    own.reshape({node: list(one.shape) for node, one in zip(own.inputs, arguments, strict=True)})
    return _core().compile_model(own, "CPU", _properties())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)  # whoever uses the result refuses NaN


def _infer(request: Any, arguments: Sequence[Tensor]) -> list[Tensor]:
    inputs = {i: one.contiguous().numpy() for i, one in enumerate(arguments)}
    outputs = request.infer(inputs, share_inputs=True)
    return [torch.from_numpy(outputs[i]) for i in range(len(outputs))]
