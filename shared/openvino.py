"""Runs torch networks in OpenVINO on a CPU: converts a module, compiles it for a few batch sizes, and calls it.

A row has the same bits in every batch. OpenVINO's threads do not wait for each other at every layer as torch's do, so
other processes on the machine slow a call down only by the cores that they take.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from shared.device import THREADS, autocast_dtype
from shared.options import EngineName

SIZES: Final = (16, 8, 4, 2, 1)  # rows of a call; larger calls are hardly faster a row
REFERENCE: Final = 4  # the size whose bits the others must have
MOST_PADDING: Final = 1 / 8  # of a call: two smaller calls cost less than one with more padding


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

    `module`: in eval mode and on the CPU; its arguments and results are tensors whose first dimension is the batch.
    `example`: typical arguments for any number of rows, of the shapes that every call has. Later changes of the
    module's weights have no effect. A size is compiled when a call first needs it, in some tenths of a second.
    """

    def __init__(self, module: nn.Module, example: Sequence[Tensor]) -> None:
        self._graph = _convert(module, example)
        self._example = [one[:1] for one in example]
        self._requests = {REFERENCE: _compile(self._graph, REFERENCE)}  # by size, each with its compiled network
        self._unequal = set[int]()  # sizes for which OpenVINO has kernels with other rounding

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Compute any number of rows, at least one; return the module's results, as float32."""
        parts, start, rows = [], 0, len(arguments[0])
        while start < rows:
            size = self._next_size(rows - start)
            parts.append(self._call(size, [one[start : start + size] for one in arguments]))
            start += size
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    def _next_size(self, left: int) -> int:
        """Return the largest size that so many rows fill, or nearly fill."""
        filled = (size for size in SIZES if left >= size * (1 - MOST_PADDING) and self._keeps_bits(size))
        padded = (size for size in reversed(SIZES) if left < size and self._keeps_bits(size))
        return next(filled, None) or next(padded)

    def _call(self, size: int, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Compute at most `size` rows. Those that fill the call up are discarded."""
        rows = len(arguments[0])
        filled = [torch.cat([one, one[:1].expand(size - rows, *one.shape[1:])]) for one in arguments]
        return [result[:rows] for result in _infer(self._requests[size], filled)]

    def _keeps_bits(self, size: int) -> bool:
        """Whether a row has the bits of the reference in a call of this size, which depends on the CPU."""
        if size not in self._requests and size not in self._unequal:
            request = _compile(self._graph, size)
            found, expected = (
                _infer(one, [value.expand(rows, *value.shape[1:]) for value in self._example])
                for one, rows in ((request, size), (self._requests[REFERENCE], REFERENCE))
            )
            if all(torch.equal(a, b[:1].expand_as(a)) for a, b in zip(found, expected, strict=True)):
                self._requests[size] = request
            else:
                self._unequal.add(size)
        return size not in self._unequal


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _convert(module: nn.Module, example: Sequence[Tensor]) -> Any:
    """Return the graph of a module: what `openvino.convert_model` does, without the checks that take it ten seconds."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer warns of every Python condition that it fixes
        traced = TorchScriptPythonDecoder(module, example_input=tuple(example), trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(traced))


def _compile(graph: Any, rows: int) -> Any:
    """Return a request of the graph, compiled for so many rows."""
    own = graph.clone()
    own.reshape({one: [rows, *list(one.partial_shape)[1:]] for one in own.inputs})
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16" if autocast_dtype(torch.device("cpu")) else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": THREADS,
        "ENABLE_CPU_PINNING": False,  # other processes may have the core that a pinned thread waits for
    }
    return _core().compile_model(own, "CPU", properties).create_infer_request()


def _infer(request: Any, arguments: Sequence[Tensor]) -> list[Tensor]:
    inputs = {i: one.contiguous().numpy() for i, one in enumerate(arguments)}
    outputs = request.infer(inputs, share_inputs=True)
    return [torch.from_numpy(outputs[i]) for i in range(len(outputs))]
