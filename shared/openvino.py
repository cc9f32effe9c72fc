"""Runs torch networks in OpenVINO on a CPU: converts a module, compiles it for a few batch sizes, and calls it.

A row has the same bits in every batch. A batch is split among streams, which are threads that do not wait for each
other: other processes on the machine slow a call down only by the cores that they take.
"""

from __future__ import annotations

import importlib.util
import io
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from shared import storage
from shared.device import THREADS, autocast_dtype
from shared.options import EngineName

STREAMS: Final = min(THREADS, 4)  # that share a batch; more would leave too few rows for each
TORCH_THREADS: Final = 1  # beside OpenVINO: torch's others would spin on the cores that it needs
LOADER: Final = "openvino"  # name of the threads that compile and keep networks


class Size(NamedTuple):
    """What a network is compiled for: the rows of a call, and how many such calls run at the same time."""

    rows: int
    streams: int


# All threads compute one row. A network begins with this size, and the others must give its bits.
ALONE: Final = Size(1, 1)
# Of a stream's calls. Larger ones are hardly faster a row (docs/dev/decisions.md).
MOST_ROWS: Final = 4
SHARED: Final = (Size(MOST_ROWS, STREAMS), Size(2, STREAMS), Size(1, STREAMS))

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
    """A torch module as OpenVINO computes it: in float32 if it is `exact` or if the CPU does not multiply bfloat16.

    `module`: in eval mode and on the CPU, with weights that no longer change; its arguments and results are tensors
    whose first dimension is the batch. `example`: typical arguments for one row, of the shapes that every call has.
    `kept`: begins the names of files that keep what is compiled, so that it loads faster the next time; the folder is
    the checkpoint's own. `most`: rows of the largest call. Sizes other than ALONE are compiled in threads once calls
    could use them. Until then smaller ones take their place. Only one thread may call it at a time.
    """

    def __init__(
        self, module: nn.Module, example: Sequence[Tensor], kept: Path | None = None, *, most: int = MOST_ROWS,
        exact: bool = False,
    ) -> None:  # fmt: skip
        self._module, self._example, self._kept, self._most, self._exact = module, example, kept, most, exact
        self._compiled = dict[Size, Any]()
        self._requests = dict[Size, list[Any]]()  # as many as have run at the same time
        self._begun = {ALONE}
        compiled, is_new = self._load(ALONE)
        self._compiled[ALONE] = compiled
        if is_new:
            threading.Thread(target=self._keep, args=(ALONE, compiled), name=LOADER).start()

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Compute any number of rows, at least one; return the module's results, as float32."""
        running, given, start, used = [], [], 0, Counter[Size]()
        for size in self._calls(len(arguments[0])):
            request = self._request(size, used[size])
            used[size] += 1
            # until it is computed, a request reads the arguments themselves
            given.append({i: one[start : start + size.rows].numpy() for i, one in enumerate(arguments)})
            request.start_async(given[-1], share_inputs=True)
            running.append(request)
            start += size.rows
        for request in running:
            request.wait()
        return [torch.cat(results) for results in zip(*map(_results, running), strict=True)]

    def _calls(self, rows: int) -> Iterator[Size]:
        """Yield the sizes of the calls that compute so many rows: an equal share of them for each stream."""
        if rows <= STREAMS / 2:
            yield from [ALONE] * rows
            return
        for stream in range(STREAMS):
            left = rows // STREAMS + (stream < rows % STREAMS)
            while left:
                size = self._largest(left)
                yield size
                left -= size.rows

    def _largest(self, left: int) -> Size:
        """Return the largest loaded size of at most so many rows; begin to load larger ones."""
        for size in SHARED:
            if size.rows <= min(left, self._most):
                if size in self._compiled:
                    return size
                if size not in self._begun:
                    self._begun.add(size)
                    threading.Thread(target=self._add, args=(size,), name=LOADER).start()
        return ALONE

    def _request(self, size: Size, place: int) -> Any:
        """Return a request that runs beside `place` others of its size."""
        requests = self._requests.setdefault(size, [])
        if place == len(requests):
            requests.append(self._compiled[size].create_infer_request())
        return requests[place]

    def _add(self, size: Size) -> None:
        """Load and keep a size, unless a row has other bits in it, which depends on the CPU."""
        compiled, is_new = self._load(size)
        if is_new and not self._has_bits(compiled, size):
            return
        self._compiled[size] = compiled
        if is_new:
            self._keep(size, compiled)

    def _has_bits(self, compiled: Any, size: Size) -> bool:
        """Whether a row has the same bits in calls of this size as alone."""
        found, expected = (
            _infer(network, self._rows(rows))
            for network, rows in ((compiled, size.rows), (self._compiled[ALONE], ALONE.rows))
        )
        return all(_same_bits(a, b.expand_as(a)) for a, b in zip(found, expected, strict=True))

    def _rows(self, count: int) -> list[Tensor]:
        """Return arguments for so many equal rows."""
        return [one.expand(count, *one.shape[1:]) for one in self._example]

    def _load(self, size: Size) -> tuple[Any, bool]:
        """Return the network for calls of this size, and whether it is new: compiled now, and not kept before."""
        if self._kept is not None:
            with suppress(OSError, RuntimeError):  # absent, or damaged
                content = _file(self._kept, size).read_bytes()
                return _core().import_model(content, "CPU", _properties(size.streams, self._exact)), False
        return _compile(self._graph, self._rows(size.rows), size.streams, self._exact), True

    def _keep(self, size: Size, compiled: Any) -> None:
        if self._kept is None:
            return
        content, file = io.BytesIO(), _file(self._kept, size)
        with suppress(OSError):  # a full or read-only disk costs the next start some seconds
            compiled.export_model(content)
            storage.write(file, content.getbuffer())
            for former in set(file.parent.glob(file.name.replace(_made_by(), "*"))) - {file}:
                former.unlink(missing_ok=True)  # of another version of a library or of this code

    @cached_property
    def _graph(self) -> Any:
        return _convert(self._module, self._example)


def _file(kept: Path, size: Size) -> Path:
    return kept.with_name(f"{kept.name}-{size.rows}x{size.streams}-{_made_by()}.openvino")


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


@cache
def _made_by() -> str:
    """Return a digest of what decides how weights are compiled: libraries, this CPU, and our own code."""
    import openvino

    cpu = [str(_core().get_property("CPU", name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    digest = blake2b(repr([openvino.__version__, torch.__version__, cpu, _properties(STREAMS)]).encode(), digest_size=8)
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _properties(streams: int, exact: bool = False) -> dict[str, Any]:
    in_bf16 = autocast_dtype(torch.device("cpu")) and not exact
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32",
        "NUM_STREAMS": streams,
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


def _compile(graph: Any, arguments: Sequence[Tensor], streams: int, exact: bool = False) -> Any:
    """Return the graph compiled for arguments of these shapes."""
    own = graph.clone()
    own.reshape({node: list(one.shape) for node, one in zip(own.inputs, arguments, strict=True)})
    return _core().compile_model(own, "CPU", _properties(streams, exact))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)  # whoever uses the result refuses NaN


def _infer(compiled: Any, arguments: Sequence[Tensor]) -> list[Tensor]:
    request = compiled.create_infer_request()
    request.infer({i: one.numpy() for i, one in enumerate(arguments)})
    return _results(request)


def _results(request: Any) -> list[Tensor]:
    """Return what a request has computed, until it runs again."""
    return [torch.from_numpy(tensor.data) for tensor in request.output_tensors]
