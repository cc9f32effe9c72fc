"""The stepping loop: batching, guidance, dropped labels, row counts, and why cosine does not diverge."""

import pytest
import torch
from torch import Tensor

from shared.diffusion.denoise import OneCallStepper, Row, Stepper, finish, sample
from shared.diffusion.path import NoisePath
from shared.diffusion.schedules import alpha_bar, betas
from shared.options import SamplingOptions
from tests.toy import K, ToyNetwork

T = 1000
LINEAR, COSINE = alpha_bar("linear"), alpha_bar("cosine")
LABELS = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
MIXED = [  # samplers, steps, guidance, intervals, spacings and clipping side by side
    SamplingOptions(sampler="dpmpp_2m", steps=6, guidance=2.0),
    SamplingOptions(sampler="ddpm", steps=9, guidance=1.0, spacing="uniform"),
    SamplingOptions(sampler="ddim", steps=4, guidance=0.0, eta=0.7),
    SamplingOptions(sampler="sde_dpmpp_2m", steps=7, guidance=3.5, guidance_interval=(0.2, 0.7), clip_x0=True),
    SamplingOptions(sampler="euler", steps=3, guidance=1.5, spacing="trailing"),
]
SEEDS = [11, 12, 13, 14, 15]


def stepper(ab: Tensor = LINEAR, *, max_rows: int = 64) -> tuple[Stepper, ToyNetwork]:
    network = ToyNetwork(ab)
    return Stepper(network, NoisePath(ab, "v"), max_rows=max_rows), network


def alone(i: int) -> Tensor:
    return sample(stepper()[0], torch.tensor(LABELS[i])[None], MIXED[i], [SEEDS[i]])[0]


# Rows in one batch


@pytest.mark.parametrize("max_rows", [64, 3, 1])
def test_rows_that_join_at_any_step_equal_rows_sampled_alone(max_rows: int) -> None:
    joins_at = [0, 0, 2, 3, 6]
    loop, _ = stepper(max_rows=max_rows)
    rows: dict[int, Row] = {}
    for now in range(20):
        for i, at in enumerate(joins_at):
            if at == now:
                rows[i] = loop.new_row(LABELS[i], MIXED[i], SEEDS[i])
        loop.step(list(rows.values()))
    for i, row in rows.items():
        assert row.done
        torch.testing.assert_close(row.x, alone(i), rtol=0, atol=1e-6)


@pytest.mark.parametrize("failing", ["_predict", "_noise"])
def test_a_step_that_raises_changes_no_row(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = stepper()
    rows = [loop.new_row(*one) for one in zip(LABELS, MIXED, SEEDS, strict=True)]
    work = getattr(loop, failing)
    for at in range(9):

        def work_and_fail(*arguments: object) -> None:
            work(*arguments)
            raise RuntimeError("too little memory")

        if at < 7:  # later, only rows that add no noise are left
            with monkeypatch.context() as patch:
                patch.setattr(loop, failing, work_and_fail)
                with pytest.raises(RuntimeError):
                    loop.step(rows)
        loop.step(rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(row.x, alone(i), rtol=0, atol=1e-6)


# Packing and counts


def test_torch_has_the_given_threads_during_a_step_and_its_own_after_it() -> None:
    found = list[int]()

    class Counting(ToyNetwork):
        def __call__(self, *arguments: Tensor) -> Tensor:
            found.append(torch.get_num_threads())
            return super().__call__(*arguments)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for threads in (1, None):
            sample(Stepper(Counting(LINEAR), NoisePath(LINEAR, "v"), threads=threads), torch.eye(K)[:1], MIXED[0], [1])
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(found[: len(found) // 2]) == {1}
    assert set(found[len(found) // 2 :]) == {3}


def test_network_calls_have_at_most_max_rows() -> None:
    loop, network = stepper(max_rows=4)
    loop.step([loop.new_row(LABELS[i % 5], SamplingOptions(guidance=2.0), i) for i in range(7)])
    assert [len(call.t) for call in network.calls] == [4, 4, 4, 2]
    assert loop.network_rows == 14


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SamplingOptions(steps=10, guidance=1.0), 10),
        (SamplingOptions(steps=10, guidance=0.0), 10),
        (SamplingOptions(steps=10, guidance=3.0), 20),
        # t = 999, 899, ..., 99: inside [0.3, 0.6] are 599, 499, 399
        (SamplingOptions(steps=10, guidance=3.0, spacing="trailing", guidance_interval=(0.3, 0.6)), 13),
        (SamplingOptions(steps=10, guidance=0.0, spacing="trailing", guidance_interval=(0.3, 0.6)), 10),
        (SamplingOptions(steps=10, guidance=3.0, spacing="trailing", guidance_interval=(0.0, 0.0)), 10),
        # both ends belong to the interval
        (SamplingOptions(steps=10, guidance=3.0, spacing="trailing", guidance_interval=(0.599, 0.599)), 11),
    ],
)
def test_network_rows_are_only_those_that_guidance_needs(options: SamplingOptions, expected: int) -> None:
    loop, network = stepper()
    sample(loop, torch.tensor([LABELS[0], LABELS[1]]), options, [1, 2])
    assert loop.network_rows == 2 * expected
    assert sum(len(call.t) for call in network.calls) == 2 * expected


# Guidance


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("clip", [False, True])
def test_guidance_is_null_plus_w_times_the_difference(prediction: str, w: float, clip: bool) -> None:
    """A single step ends at x0_hat, which the toy network gives in closed form."""
    network = ToyNetwork(LINEAR, prediction)  # type: ignore[arg-type]
    loop = Stepper(network, NoisePath(LINEAR, prediction))  # type: ignore[arg-type]
    row = loop.new_row(LABELS[2], SamplingOptions(steps=1, guidance=w, clip_x0=clip), 5)
    arguments = (row.x[None].double(), torch.tensor([T - 1]), torch.tensor([LABELS[2]]))
    cond, null = (network.x0(*arguments, torch.tensor([keep])) for keep in (True, False))
    expected = null + w * (cond - null)
    if w == 4.0:
        assert float(expected.abs().max()) > 1  # else clipping would have nothing to do
    loop.step([row])
    torch.testing.assert_close(
        row.x[None].double(),
        expected.clamp(-1, 1) if clip else expected,
        rtol=0,
        atol=5e-4 if prediction == "eps" else 1e-5,
    )


# The network's inputs, and the loop's own


def test_autocast_applies_to_the_network_only() -> None:
    network = ToyNetwork(LINEAR)
    loop = Stepper(network, NoisePath(LINEAR, "v"), dtype=torch.bfloat16)
    x = sample(loop, torch.tensor(LABELS), SamplingOptions(steps=2), SEEDS)
    assert x.dtype == torch.float32
    assert all(call.autocast for call in network.calls)
    exact, plain = stepper()
    sample(exact, torch.tensor(LABELS), SamplingOptions(steps=2), SEEDS)
    assert not any(call.autocast for call in plain.calls)


def test_sample_reports_every_step_and_takes_options_for_all_or_for_each() -> None:
    seen: list[list[int]] = []
    made = sample(
        stepper()[0], torch.tensor(LABELS), MIXED, SEEDS, on_step=lambda rows: seen.append([row.step for row in rows])
    )
    assert seen[-1] == [6, 9, 4, 7, 3]
    assert len(seen) == 9
    for i, picture in enumerate(made):
        torch.testing.assert_close(picture, alone(i), rtol=0, atol=1e-6)
    assert sample(stepper()[0], torch.empty(0, K), MIXED[0], []).shape == (0, 3, 4, 6)


# Finished pictures


class Doubling:
    """An upsampler that repeats pixels, and records the batches it was given."""

    picture_shape = (3, 8, 12)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def test_finished_pictures_are_upsampled() -> None:
    upsampler = Doubling()
    loop = Stepper(ToyNetwork(LINEAR), NoisePath(LINEAR, "v"), upsampler=upsampler)
    plain = sample(stepper()[0], torch.tensor(LABELS), MIXED, SEEDS)
    made = sample(loop, torch.tensor(LABELS), MIXED, SEEDS)
    assert made.shape == (5, *loop.picture_shape) == (5, 3, 8, 12)
    assert torch.equal(made[..., ::2, ::2], plain)
    assert upsampler.batches == [5]
    assert torch.equal(loop.enlarge(plain), made)
    assert torch.equal(stepper()[0].enlarge(plain), plain)
    assert sample(loop, torch.empty(0, K), MIXED[0], []).shape == (0, 3, 8, 12)


class Finishing:
    """A network of one call: the toy's prediction, and larger pictures that are filled with the first label."""

    image_shape, num_labels = (3, 4, 6), K

    def __init__(self) -> None:
        self.toy = ToyNetwork(LINEAR)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return self.toy(x, t, labels, keep), labels[:, :1, None, None].expand(-1, 3, 8, 12)


def test_a_network_of_one_call_takes_one_step_and_returns_the_pictures_itself() -> None:
    network, options = Finishing(), SamplingOptions(steps=1, guidance=1.0)
    loop = OneCallStepper(network, NoisePath(LINEAR, "v"), picture_shape=(3, 8, 12), max_rows=2)
    rows = loop.new_rows(LABELS, [options] * 5, SEEDS)
    made = finish(loop, rows)
    assert [one[0, 0, 0].item() for one in made] == [own[0] for own in LABELS]
    assert made.shape == (5, *loop.picture_shape)
    assert [len(call.t) for call in network.toy.calls] == [2, 2, 1]
    assert loop.network_rows == 5
    assert all(row.done for row in rows)
    small = sample(stepper()[0], torch.tensor(LABELS), options, SEEDS)
    torch.testing.assert_close(torch.stack([row.x for row in rows]), small, rtol=0, atol=1e-6)
    assert sample(loop, torch.empty(0, K), options, []).shape == (0, 3, 8, 12)
    for other in (SamplingOptions(steps=2, guidance=1.0), SamplingOptions(steps=1, guidance=2.0)):
        with pytest.raises(ValueError, match="in one step, without guidance"):
            loop.new_row(LABELS[0], other, 1)
    with pytest.raises(ValueError, match="it enlarges no others"):
        loop.enlarge(small)


def test_invalid_arguments_are_refused() -> None:
    loop, _ = stepper()
    with pytest.raises(ValueError, match=r"labels have shape \(3,\), the network takes \(4,\)"):
        loop.new_row([1.0, 0.0, 0.0], SamplingOptions(), 1)
    with pytest.raises(ValueError, match="5 label lists, 5 options and 4 seeds do not match"):
        sample(loop, torch.tensor(LABELS), SamplingOptions(), SEEDS[:4])
    with pytest.raises(ValueError, match="max_rows"):
        stepper(max_rows=0)


# The report's cosine


class Saturating:
    """An ideal eps for black pictures (x_0 = 0), 3 % wrong, which knows no input beyond four deviations, as a UNet."""

    image_shape, num_labels = (1, 20, 20), K

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
        eps = (x / (1 - COSINE[t].float()).sqrt()[:, None, None, None]).clamp(-4, 4)
        return eps + 0.03 * torch.randn(x.shape, generator=self.generator)


def test_the_reports_cosine_run_diverges_and_ours_does_not() -> None:
    """The clip and update that `schedules.py` describes, compared with our preset of the same sampling."""
    network = Saturating()
    beta = betas("cosine").float()
    beta[-1] = 0.9999
    alpha_hat = torch.cumprod(1 - beta, dim=0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, *network.image_shape), generator=generator)
    nothing = torch.zeros(1, K)
    for i in reversed(range(1, T)):
        eps = network(x, torch.tensor([i]), nothing, torch.tensor([True]))
        x = (x - beta[i] / torch.sqrt(1 - alpha_hat[i]) * eps) / torch.sqrt(1 - beta[i])
        x += torch.sqrt(beta[i]) * torch.randn(x.shape, generator=generator) * (i > 1)
    assert float(x.std()) > 100
    options = SamplingOptions(sampler="ddpm", steps=999, spacing="uniform", guidance=1.0)
    ours = sample(Stepper(network, NoisePath(COSINE, "eps")), nothing, options, [1])
    assert float(ours.std()) < 0.05
