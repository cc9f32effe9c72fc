"""Finds the call sizes with which a picture does not depend on its batch, bit by bit.

Matrix kernels are chosen by size, and another kernel may add in another order ("Defeating Nondeterminism in LLM
Inference", He et al. 2025). Whether that happens depends on network, torch and CPU, so it is tried out.
"""

import time
from bisect import insort
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from shared.diffusion.denoise import Stepper
from shared.diffusion.packed import can_pack
from shared.options import SamplingOptions

BUDGET_S = 2.0
MOST_PADDING = 1 / 8  # of a call: on a CPU, two smaller calls cost less than more of it

Call = Callable[[int], Tensor]
T = TypeVar("T")
Pausing = Generator[None, None, T]  # work that can pause before each network call, and returns a T


def without_pauses(work: Pausing[T], is_ending: Callable[[], bool] = lambda: False) -> T:
    """Do work without a pause. CancelledError if `is_ending` before it is done."""
    while not is_ending():
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
    raise CancelledError


def bound(stepper: Stepper, max_rows: int, clock: Callable[[], float] = time.perf_counter) -> list[int]:
    """Limit network calls to `max_rows` rows, and to sizes with which a row's result is the same in all of them.

    Return these sizes: all up to `max_rows`; or those that others are split into or padded to; or only 1, if a row
    depends on its place in the batch. Calls of one row are among them where `keeps_one_row`.
    """
    return without_pauses(bounding(stepper, max_rows, clock))


def keeps_one_row(stepper: Stepper) -> bool:
    """Whether the sizes are to give the bits of one row: of a packed network in which two rows have them, too.

    Nearly all sizes do then. Of a network that is not packed, most give the bits of the largest. Leaves another bound.
    """
    if not can_pack(stepper.device):
        return False
    stepper.bound(2)
    call = _copies(stepper)
    return _all_equal(call(2), call(1))


def bounding(stepper: Stepper, max_rows: int, clock: Callable[[], float] = time.perf_counter) -> Pausing[list[int]]:
    """Do what `bound` does, with pauses."""
    yield
    as_alone = keeps_one_row(stepper)
    stepper.bound(max_rows)
    sizes = yield from comparing(_copies(stepper), max_rows, clock, as_alone=as_alone)
    if not sizes:
        stepper.bound(1)
        return [1]
    stepper.bound(sizes[-1])
    if len(sizes) < sizes[-1]:
        stepper.bound(sizes[-1], sizes, MOST_PADDING)
    return sizes


def comparing(
    call: Call, max_rows: int, clock: Callable[[], float] = time.perf_counter, *, as_alone: bool = False
) -> Pausing[list[int]]:
    """Return the sizes up to `max_rows` that give the same bits as `max_rows`.

    Powers of two are always tried, lest a slow machine pads a single picture to a whole batch; others as far as
    BUDGET_S allows. `call(n)` returns the network's output for n equal rows. Empty if they differ from each other in a
    call of `max_rows`.

    Pauses do not count in BUDGET_S. `as_alone`: sizes that give the bits of size 1 instead.
    """
    yield
    whole = call(max_rows)
    wanted = whole[:1]
    if as_alone:
        yield
        wanted = call(1)
    spent, found = 0.0, set[int]()
    if _all_equal(whole, wanted):
        found.add(max_rows)
    elif not as_alone:
        return []
    for size in _order(max_rows):
        is_power = size & (size - 1) == 0
        if spent > BUDGET_S and not is_power:
            break
        yield
        begun = clock()
        if _all_equal(call(size), wanted):
            found.add(size)
        spent += clock() - begun
    return sorted(found)


def _order(max_rows: int) -> Iterator[int]:
    """Yield the sizes below `max_rows`: the powers of two, then the middle of the widest gap, again and again."""
    powers = [1 << i for i in range(max_rows.bit_length()) if 1 << i < max_rows]
    yield from powers
    known = [*powers, max_rows]
    for _ in range(max_rows - len(known)):
        low, high = max(pairwise(known), key=lambda gap: gap[1] - gap[0])
        yield (middle := (low + high) // 2)
        insort(known, middle)


def _all_equal(rows: Tensor, wanted: Tensor) -> bool:
    return torch.equal(rows, wanted.expand_as(rows))


def _copies(stepper: Stepper) -> Call:
    """Return a function that steps so many copies of one picture and returns their x0_hat (N, C, H, W)."""
    options = SamplingOptions(steps=1, guidance=1.0)  # one row for each picture
    # all labels at once, at places of their own: a sum of one label is the same in any order
    labels = torch.ones(stepper.network.num_labels)
    places = torch.rand(len(labels), 2, generator=torch.Generator().manual_seed(0))
    first = stepper.new_row(labels, options, seed=0, positions=None if stepper.layouts is None else places)

    def call(count: int) -> Tensor:
        rows = [replace(first) for _ in range(count)]
        stepper.step(rows)
        return torch.stack([row.x0_hat for row in rows if row.x0_hat is not None])

    return call
