"""The stepping loop: guidance, one batched network call and one linear update, for pictures at different steps.

Knows no solver (a sampler is a table), no schedule by name, no jobs and no files. Trainer and service both use it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.device import autocast, to_device, torch_threads
from shared.diffusion.inputs import unknown, with_inputs
from shared.diffusion.layouts import Layouts, as_rotations, with_positions
from shared.diffusion.path import NoisePath
from shared.diffusion.samplers import Table, make_table
from shared.options import SamplingOptions, network_rows


class Network(Protocol):
    """The denoising network, as the loop sees it."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # (C, H, W)

    @property
    def num_labels(self) -> int: ...  # K

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W) float32, t (B,) int64, labels (B, K) float32, keep (B,) bool -> eps_hat or v_hat (B, C, H, W).

        A network of one call also returns the finished pictures (B, C, H', W'), as `upsampler.OneCall`. keep False
        drops the row's labels (the null condition). A network with positions takes labels (B, K, 3): multi-hot and
        position; one with rotations (B, K, 5), see `layouts.with_positions`.
        """


class Upsampler(Protocol):
    """The network that enlarges finished pictures, as the loop sees it."""

    @property
    def picture_shape(self) -> tuple[int, int, int]: ...  # (C, H, W)

    def __call__(self, x: Tensor) -> Tensor:
        """Sampled pictures x (N, C, h, w) float32 -> pictures (N, C, H, W)."""


@dataclass(slots=True, eq=False)
class Row:
    """One picture being sampled, with its own table, step, labels, guidance and random numbers."""

    x: Tensor  # (C, H, W) float32, on the stepper's device; the sampled picture, in about [-1, 1], when `done`
    labels: Tensor  # (K,) float32 multi-hot, (K, 3) with positions, (K, 5) with rotations; on the stepper's device
    options: SamplingOptions
    table: Table
    w: Sequence[float]  # the guidance scale of each step
    generator: torch.Generator  # on the CPU, so that a seed gives the same noise on any device
    step: int = 0
    x0_hat: Tensor | None = None  # (C, H, W), the latest prediction; None before the first step
    picture: Tensor | None = None  # (C, H', W'), the finished picture of a network of one call, when `done`

    @property
    def done(self) -> bool:
        return self.step == len(self.table)

    def network_rows(self) -> list[int]:
        """Return the network rows of each step that is left."""
        return [network_rows(w) for w in self.w[self.step :]]


@dataclass(frozen=True)
class _Pack:
    """The network rows of one step: each one's picture, whether it keeps its labels, and its guidance weight."""

    pictures: list[int]
    keep: list[bool]
    weights: list[float]


class Stepper:
    """Advances each row by one step of its own table, with as few network rows as its guidance allows.

    `network`: see `Network`; in eval mode and on `device`. `path`: from pictures to noise, with what the network
    predicts. `dtype`: autocast to it, or None for float32. `max_rows`: the largest batch of a network call.
    `layouts`: draws the positions for a network that takes them; `rotations`: whether it takes those too; `symmetric`:
    labels, by index, whose objects have none. `inputs`: the picture-wide ones that it takes. `upsampler`: enlarges
    finished pictures. `threads`: of torch during a step, if the networks run in another library: torch's would spin on
    the cores that it needs.
    `network_rows` counts the rows computed so far.
    """

    def __init__(
        self,
        network: Network,
        path: NoisePath,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_rows: int = 64,
        layouts: Layouts | None = None,
        rotations: bool = False,
        symmetric: Sequence[int] = (),
        inputs: Sequence[str] = (),
        upsampler: Upsampler | None = None,
        threads: int | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.network, self.device, self.dtype, self.max_rows = network, torch.device(device), dtype, max_rows
        self.layouts, self.rotations, self.upsampler = layouts, rotations, upsampler
        self.symmetric, self.inputs = list(symmetric), tuple(inputs)
        self.network_rows, self.threads = 0, threads
        self.path, self._to_x0 = path, path.to_x0.rows()
        self._plan: Callable[[SamplingOptions], tuple[Table, Sequence[float]]] = lru_cache(128)(
            lambda options: _plan(options, path.alpha_bar)
        )

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of a finished picture."""
        return self.network.image_shape if self.upsampler is None else self.upsampler.picture_shape

    def new_row(
        self,
        labels: Tensor | Sequence[float],
        options: SamplingOptions,
        seed: int,
        positions: Tensor | None = None,
        inputs: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> Row:
        """Return a picture at its first step, as `new_rows` does. labels (K,), positions (K, 2)."""
        (row,) = self.new_rows([labels], [options], [seed], [positions], inputs)
        return row

    def new_rows(
        self,
        labels: Sequence[Tensor | Sequence[float]] | Tensor,
        options: Sequence[SamplingOptions],
        seeds: Sequence[int],
        positions: Sequence[Tensor | None] | None = None,
        inputs: Mapping[str, Sequence[float]] = MappingProxyType({}),
    ) -> list[Row]:
        """Return pictures at their first step. A seed determines a picture's noise and what else the network takes:
        positions, and rotations, any of which is as likely as any other. It does not depend on the other pictures.
        Labels without rotations are given none, as in training.

        labels (N, K) multi-hot. `positions`, (K, 2) each, replace the drawn ones and leave all else unchanged.
        `inputs`: the numbers of picture-wide inputs, which are unknown otherwise. ValueError for other shapes, for
        positions and inputs if the network takes none.
        """
        places = [None] * len(seeds) if positions is None else positions
        hot, generators = list[Tensor](), [torch.Generator().manual_seed(seed) for seed in seeds]
        for own, asked, at in zip(labels, options, places, strict=True):
            hot.append(self._checked(own, asked, at))
        if other := [name for name in inputs if name not in self.inputs]:
            raise ValueError(f'the network takes no input "{other[0]}"')
        values = unknown(self.inputs) | {name: torch.tensor(numbers) for name, numbers in inputs.items()}
        noise = [torch.randn(self.network.image_shape, generator=generator) for generator in generators]
        if self.layouts is not None and hot:
            drawn = self.layouts.draw(torch.stack(hot), generators)
            for i, (at, generator) in enumerate(zip(places, generators, strict=True)):
                rotations = self._draw_rotations(generator) if self.rotations else None
                hot[i] = with_positions(hot[i], drawn[i] if at is None else at.cpu(), rotations)
        return [
            Row(
                x.to(self.device), with_inputs(own, values, self.inputs).to(self.device), asked, *self._plan(asked),
                generator,
            )
            for x, own, asked, generator in zip(noise, hot, options, generators, strict=True)
        ]  # fmt: skip

    def _checked(
        self, labels: Tensor | Sequence[float], options: SamplingOptions, positions: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Return multi-hot labels (K,) on the CPU, if the network can draw this."""
        labels = torch.as_tensor(labels, dtype=torch.float32, device="cpu")
        if labels.shape != (self.network.num_labels,):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, the network takes ({self.network.num_labels},)")
        if positions is not None and (self.layouts is None or positions.shape != (len(labels), 2)):
            takes = "no positions" if self.layouts is None else f"({len(labels)}, 2)"
            raise ValueError(f"positions have shape {tuple(positions.shape)}, the network takes {takes}")
        return labels

    def _draw_rotations(self, generator: torch.Generator) -> Tensor:
        """Return rotations (K, 2), see `as_rotations`. Those of all labels are drawn, so that none shifts another's."""
        turns = torch.rand(self.network.num_labels, generator=generator)
        turns[self.symmetric] = torch.nan
        return as_rotations(turns)

    def noised_row(self, x: Tensor, noise: Tensor, labels: Tensor, options: SamplingOptions, step: int) -> Row:
        """Return a row that begins at a later `step` than the first, with picture x (C, H, W) in noise (C, H, W).

        labels: (K,), (K, 3) or (K, 5), as the network takes them. Where a sampler looks back at x0_hat of the step
        before, that is x. The noise that some samplers add at each step has a fixed seed.
        """
        table, w = self._plan(options)
        return Row(
            self.path.noised(x, noise, table.rows[step][0]), labels, options, table, w, torch.Generator(), step, x
        )

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        """Advance every row that is not done by one step. A row's result does not depend on the other rows.

        If it raises, no row has changed.
        """
        rows = [row for row in rows if not row.done]
        if rows:
            with torch_threads(self.threads):
                self._step(rows)

    def _step(self, rows: Sequence[Row]) -> None:
        x, t, labels = _stacked(rows)
        self._advance(rows, x, self._predict(x, t, labels, [row.w[row.step] for row in rows]))

    def _advance(self, rows: Sequence[Row], x: Tensor, out: Tensor) -> None:
        """Take the rows' step of their tables, by their pictures x and guided predictions, (N, C, H, W) each."""
        now = [row.table.rows[row.step] for row in rows]
        p, q, limit, a, b, c, s = self._column_vectors(rows, now)
        x0_hat = (p * x + q * out).clamp(-limit, limit)  # (N, C, H, W)
        x_next = a * x + b * x0_hat
        if any(c_i != 0 for *_, c_i, _ in now):
            x_next += c * torch.stack([row.x0_hat if row.x0_hat is not None else row.x for row in rows])
        noisy = [s_i != 0 for *_, s_i in now]
        generators = [row.generator.clone_state() if add else None for row, add in zip(rows, noisy, strict=True)]
        if any(generators):
            x_next += s * self._noise(generators)
        for row, row_x, row_x0_hat, generator in zip(rows, x_next.unbind(), x0_hat.unbind(), generators, strict=True):
            row.x, row.x0_hat, row.step, row.generator = row_x, row_x0_hat, row.step + 1, generator or row.generator

    def pictures(self, rows: Sequence[Row]) -> Tensor:
        """Return the rows' pictures at their final size: (N, C, H, W) float32 in about [-1, 1], on the CPU."""
        return self.enlarge(torch.stack([row.x for row in rows])) if rows else torch.empty(0, *self.picture_shape)

    @torch.inference_mode()
    def enlarge(self, x: Tensor) -> Tensor:
        """Return sampled pictures x (N, C, h, w), N > 0, at their final size: (N, C, H, W) float32, on the CPU.

        Without an upsampler that is x itself.
        """
        if self.upsampler is None:
            return x.cpu()
        with torch_threads(self.threads), autocast(self.device, self.dtype):
            return torch.cat([self.upsampler(part).float() for part in torch.split(x, self.max_rows)]).cpu()

    def _column_vectors(self, rows: Sequence[Row], now: Sequence[tuple[int, float, float, float, float]]) -> Tensor:
        """Return (7, N, 1, 1, 1): p, q, limit (x0_hat = p x + q prediction, clamped to +-limit), a, b, c, s by row."""
        values = []
        for row, (t, *coefficients) in zip(rows, now, strict=True):
            p, q, limit = self._to_x0[t]
            values.append((p, q, 1.0 if row.options.clip_x0 else limit, *coefficients))
        return to_device(torch.tensor(values, dtype=torch.float32), self.device).T[:, :, None, None, None]

    def _noise(self, generators: Sequence[torch.Generator | None]) -> Tensor:
        """Return z (N, C, H, W): noise from each row's generator, or zeros for a row without one."""
        z = torch.zeros(len(generators), *self.network.image_shape)
        for z_i, generator in zip(z, generators, strict=True):
            if generator is not None:
                torch.randn(z_i.shape, generator=generator, out=z_i)
        return to_device(z, self.device)

    def _predict(self, x: Tensor, t: Sequence[int], labels: Tensor, w: Sequence[float]) -> Tensor:
        """Return guided predictions null + w (cond - null): x (N, C, H, W) at timesteps t -> (N, C, H, W) float32.

        Classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is ours minus 1). Guiding the prediction equals
        guiding x0_hat, which is linear in it.
        """
        pack = _pack(w)
        index = to_device(torch.tensor(pack.pictures), self.device)
        keep = to_device(torch.tensor(pack.keep), self.device)
        weights = to_device(torch.tensor(pack.weights, dtype=torch.float32), self.device)[:, None, None, None]
        at, guided = to_device(torch.tensor(t), self.device), torch.zeros_like(x)
        calls = (torch.split(part, self.max_rows) for part in (index, keep, weights))
        for i, keep_i, weights_i in zip(*calls, strict=True):
            with autocast(self.device, self.dtype):
                prediction = self.network(x[i], at[i], labels[i], keep_i)
            assert isinstance(prediction, Tensor)  # a network of one call has a stepper of its own
            guided.index_add_(0, i, prediction.float() * weights_i)
        self.network_rows += len(index)
        return guided


class OneCallStepper(Stepper):
    """Of a network of one call, which takes one step, without guidance, and returns the finished pictures itself.

    `picture_shape`: theirs, (C, H', W'). `options`: those of `Stepper`; there is no upsampler beside the network.
    """

    def __init__(
        self, network: Network, path: NoisePath, *, picture_shape: tuple[int, int, int], **options: Any
    ) -> None:  # fmt: skip
        super().__init__(network, path, **options)
        self._picture_shape = picture_shape

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        return self._picture_shape

    def _checked(
        self, labels: Tensor | Sequence[float], options: SamplingOptions, positions: Tensor | None
    ) -> Tensor:  # fmt: skip
        if (options.steps, options.guidance) != (1, 1.0):
            raise ValueError("the network draws a picture in one step, without guidance")
        return super()._checked(labels, options, positions)

    def _step(self, rows: Sequence[Row]) -> None:
        x, t, labels = _stacked(rows)
        at, keep = to_device(torch.tensor(t), self.device), torch.ones(len(rows), dtype=torch.bool, device=self.device)
        drawn = []
        for part in zip(*(torch.split(one, self.max_rows) for one in (x, at, labels, keep)), strict=True):
            with autocast(self.device, self.dtype):
                prediction, pictures = self.network(*part)
            drawn.append((prediction.float(), pictures.float()))
        self.network_rows += len(rows)
        predictions, pictures = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        self._advance(rows, x, predictions)
        for row, picture in zip(rows, pictures, strict=True):
            row.picture = picture

    def pictures(self, rows: Sequence[Row]) -> Tensor:
        drawn = [row.picture for row in rows if row.picture is not None]
        return torch.stack(drawn).cpu() if drawn else torch.empty(0, *self.picture_shape)

    def enlarge(self, x: Tensor) -> Tensor:
        """Raise ValueError: what enlarges the pictures also sees features of the network."""
        raise ValueError("the network draws finished pictures itself; it enlarges no others")


def _stacked(rows: Sequence[Row]) -> tuple[Tensor, list[int], Tensor]:
    """Return the rows' pictures (N, C, H, W), the timesteps of their next step, and their labels (N, K, ...)."""
    t = [row.table.rows[row.step][0] for row in rows]
    return torch.stack([row.x for row in rows]), t, torch.stack([row.labels for row in rows])


def _pack(w: Sequence[float]) -> _Pack:
    """Choose the network rows: two for a guided picture, one if w is 1 or guidance is off (labels), or 0 (null)."""
    pack = _Pack([], [], [])
    for i, scale in enumerate(w):
        for keep, weight in ((True, scale), (False, 1 - scale)):
            if weight != 0:
                pack.pictures.append(i)
                pack.keep.append(keep)
                pack.weights.append(weight)
    return pack


def _plan(options: SamplingOptions, alpha_bar: Tensor) -> tuple[Table, Sequence[float]]:
    """Return the table, and the guidance scale of each of its steps: 1 outside the guidance interval."""
    table, (low, high) = make_table(options, alpha_bar), options.guidance_interval
    return table, [options.guidance if low <= t / len(alpha_bar) <= high else 1.0 for t, *_ in table.rows]


def sample(
    stepper: Stepper,
    labels: Tensor,
    options: SamplingOptions | Sequence[SamplingOptions],
    seeds: Sequence[int],
    *,
    on_step: Callable[[Sequence[Row]], None] | None = None,
) -> Tensor:
    """Sample pictures for multi-hot labels (N, K), one seed each, and return them as `Stepper.pictures` does.

    `options`: one for all pictures, or one each. Raises ValueError if the numbers of labels, options and seeds differ,
    and as `finish`.
    """
    each = [options] * len(labels) if isinstance(options, SamplingOptions) else list(options)
    if not len(labels) == len(each) == len(seeds):
        raise ValueError(f"{len(labels)} label lists, {len(each)} options and {len(seeds)} seeds do not match")
    return finish(stepper, stepper.new_rows(labels, each, seeds), on_step)


def take_steps(stepper: Stepper, rows: Sequence[Row], on_step: Callable[[Sequence[Row]], None] | None = None) -> None:
    """Take all steps that are left. `on_step` is called with all rows after every step."""
    while any(not row.done for row in rows):
        stepper.step(rows)
        if on_step is not None:
            on_step(rows)


def finish(stepper: Stepper, rows: Sequence[Row], on_step: Callable[[Sequence[Row]], None] | None = None) -> Tensor:
    """Take all steps that are left, as `take_steps`, and return the pictures as `Stepper.pictures` does.

    FloatingPointError if a picture is not finite: an evaluator would give it a plausible score.
    """
    take_steps(stepper, rows, on_step)
    pictures = stepper.pictures(rows)
    if not pictures.isfinite().all():
        raise FloatingPointError("the network's output is not finite")
    return pictures
