"""The engine: a picture does not depend on its batch, and one that fails does not affect the others.

Small jobs step before large ones that would delay them, but none waits forever.
"""

import io
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from service.contract.options import PictureOptions
from service.contract.records import FinishedPicture, Picture
from service.worker.engine import BatchSizes, Engine, frame_size
from service.worker.judge import Failed, Outcome
from shared.diffusion.denoise import Row, Stepper
from shared.diffusion.path import NoisePath
from shared.diffusion.schedules import alpha_bar
from shared.options import attempt_seed, picture_seed
from shared.vocabulary import Vocabulary
from tests.toy import ToyNetwork

NAMES = ("red cube", "blue cube", "gray sphere", "cyan cylinder")
AB = alpha_bar("cosine")
PLAIN = PictureOptions(guidance=1.0, steps=6)


class ToyJudge:
    """Computes the labels' probabilities from the means of the picture's channels."""

    def __init__(self) -> None:
        self.vocabulary = Vocabulary(NAMES)
        self.calls = 0

    def probabilities(self, images: Tensor) -> Tensor:
        self.calls += 1
        features = images.mean(dim=(2, 3))  # (N, 3)
        return torch.sigmoid(5 * torch.cat([features, features.sum(1, keepdim=True)], dim=1))

    def positions(self, images: Tensor) -> Tensor | None:
        return None


class FaultyStepper(Stepper):
    """Raises in every step of a batch that holds a row with the labels `poison`."""

    poison: Tensor | None = None

    def step(self, rows: Sequence[Row]) -> None:
        if self.poison is not None and any(torch.equal(row.labels, self.poison) for row in rows):
            raise RuntimeError("poison")
        super().step(rows)


class Enlarging:
    """Makes pictures of 8x8 pixels three times as wide and twice as high."""

    picture_shape = (3, 16, 24)

    def __call__(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -2).repeat_interleave(3, -1)


def network() -> ToyNetwork:
    return ToyNetwork(AB, image_shape=(3, 8, 8))


def engine(net: ToyNetwork | None = None, *, efficient_rows: int | None = None) -> Engine:
    stepper = FaultyStepper(net or network(), NoisePath(AB, "v"))
    return Engine(stepper, Vocabulary(NAMES), ToyJudge(), BatchSizes(8, 64, efficient_rows))


def picture(
    index: int, *, job: str = "a", labels: Sequence[str] = NAMES[:1], options: PictureOptions = PLAIN
) -> Picture:
    return Picture(job=job, index=index, labels=tuple(labels), seed=1000 + index, options=options)


def busy(one: Engine) -> bool:
    return bool(one.batch or one._failed)


def run(one: Engine) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for _ in range(200):
        if not busy(one):
            return outcomes
        outcomes += one.step()
    raise AssertionError("the engine does not finish")


def pixels(outcome: Outcome) -> np.ndarray:
    assert isinstance(outcome, FinishedPicture)
    return np.asarray(Image.open(io.BytesIO(outcome.png)), dtype=np.int16)


MIXED = [
    picture(0),
    picture(1, job="b", labels=NAMES[1:3], options=PictureOptions(steps=3, guidance=3.0)),
    picture(2, job="c", labels=NAMES[3:], options=PictureOptions(sampler="ddpm", steps=9, spacing="uniform")),
    picture(3, options=PictureOptions(sampler="ddim", eta=0.5, steps=4, guidance=0.0)),
]


def test_a_picture_is_the_same_alone_and_in_a_batch_that_others_join() -> None:
    alone = {}
    for one in MIXED:
        single = engine()
        single.admit([one])
        (alone[one.key],) = run(single)
    together = engine()
    outcomes = []
    for one in MIXED:  # each joins a step later than the one before
        together.admit([one])
        outcomes += together.step()
    outcomes += run(together)
    assert {outcome.picture.key for outcome in outcomes} == set(alone)
    for outcome in outcomes:
        expected = alone[outcome.picture.key]
        assert isinstance(outcome, FinishedPicture)
        assert isinstance(expected, FinishedPicture)
        assert np.abs(pixels(outcome) - pixels(expected)).max() <= 1
        assert outcome.verdict.probabilities == pytest.approx(expected.verdict.probabilities, abs=1e-4)


def test_pictures_are_judged_while_others_take_their_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the second step cannot end before the first picture is judged. A picture dropped meanwhile is gone."""
    one, judged = engine(), threading.Event()
    one.admit([picture(0, options=PictureOptions(steps=1)), picture(1, options=PictureOptions(steps=3))])
    assert one.step() == []
    one.wait()
    step, probabilities = one.stepper.step, one.judge.probabilities

    def late(rows: Sequence[Row]) -> None:
        assert judged.wait(60)
        step(rows)

    def judging(images: Tensor) -> Tensor:
        judged.set()
        return probabilities(images)

    monkeypatch.setattr(one.stepper, "step", late)
    monkeypatch.setattr(one.judge, "probabilities", judging)
    (ended,) = one.step()
    assert ended.picture.index == 0
    one.drop({("a", 1)})
    one.wait()
    assert not busy(one)
    assert run(one) == []


def test_a_large_job_waits_for_small_ones_and_its_pictures_stay_the_same() -> None:
    large = [picture(i, options=PictureOptions(steps=6)) for i in range(4)]  # two network rows a step, each
    large[0] = replace(large[0], trajectory=4)
    undisturbed = engine()
    undisturbed.admit(large)
    expected = {outcome.picture.key: outcome for outcome in run(undisturbed)}
    net = network()
    shared = engine(net, efficient_rows=2)
    shared.admit(large)
    shared.step()
    shared.admit([picture(9, job="b"), picture(9, job="c")])  # one network row, six steps
    outcomes = run(shared)
    assert [len(call.t) for call in net.calls] == [8] + [2] * 6 + [8] * 5
    assert [outcome.picture.job for outcome in outcomes] == ["b", "c", *"aaaa"]
    for outcome in outcomes[2:]:
        assert np.abs(pixels(outcome) - pixels(expected[outcome.picture.key])).max() <= 1
    strips = [outcome.trajectory for outcome in (outcomes[2], expected["a", 0]) if isinstance(outcome, FinishedPicture)]
    with (
        Image.open(io.BytesIO(strips[0] or b"")) as strip,
        Image.open(io.BytesIO(strips[1] or b"")) as undisturbed_strip,
    ):
        assert strip.size == undisturbed_strip.size == (2 + 4 * 10, 12)


def test_a_jobs_turn_follows_from_all_that_it_has_left_and_from_how_long_it_waits() -> None:
    one, rounds = engine(efficient_rows=1), 0
    one.admit([picture(0, options=PictureOptions(guidance=1.0, steps=40))])
    while not one.batch["a", 0].row.step:
        rounds += 1
        options = PictureOptions(guidance=1.0, steps=2)
        one.admit([picture(i, job=str(rounds), options=options) for i in range(3)])
        for _ in range(2):
            one.step()
    assert rounds == 30  # 40 rows less a fifth of the 174 computed are fewer than 6


def test_halves_of_a_failed_step_find_the_picture_that_breaks_it_and_the_others_go_on() -> None:
    net = network()
    one = engine(net)
    assert isinstance(one.stepper, FaultyStepper)
    one.stepper.poison = torch.tensor([0.0, 1.0, 0.0, 0.0])
    one.admit([picture(i, labels=NAMES[1:2] if i == 5 else NAMES[:1]) for i in range(8)])
    outcomes = run(one)
    assert [outcome.picture.index for outcome in outcomes if isinstance(outcome, Failed)] == [5]
    assert len(outcomes) == 8
    # the first step: 0 to 3, then 4, then 6 and 7; steps with picture 5 do not reach the network
    assert [len(call.t) for call in net.calls] == [4, 1, 2, 7, 7, 7, 7, 7]


def test_a_picture_that_cannot_be_started_is_reported() -> None:
    one = engine()
    one.admit([picture(0, labels=["pink cube"]), picture(1)])
    assert busy(one)
    outcomes = run(one)
    assert isinstance(outcomes[0], Failed)
    assert "pink cube" in outcomes[0].reason
    assert isinstance(outcomes[1], FinishedPicture)


@pytest.mark.parametrize("others", [[], [picture(1, job="b")]], ids=["alone", "in a batch"])
def test_output_that_is_not_finite_fails_only_its_picture(others: list[Picture]) -> None:
    one = engine()
    one.admit([picture(0), *others])
    for _ in range(5):
        one.step()
    row = one.batch["a", 0].row
    row.x = torch.full_like(row.x, torch.nan)
    outcomes = {outcome.picture.job: type(outcome) for outcome in run(one)}
    assert outcomes == {"a": Failed, **{other.job: FinishedPicture for other in others}}


def test_pictures_are_enlarged_before_they_are_judged_and_stored() -> None:
    small, large = engine(), engine()
    large.stepper.upsampler = Enlarging()
    for one in (small, large):
        one.admit([replace(picture(i), trajectory=3) for i in range(3)])
    for before, after in zip(run(small), run(large), strict=True):
        assert pixels(after).shape == (16, 24, 3)
        assert np.array_equal(pixels(after), pixels(before).repeat(2, axis=0).repeat(3, axis=1))
        assert isinstance(before, FinishedPicture)
        assert isinstance(after, FinishedPicture)
        assert after.verdict.probabilities == pytest.approx(before.verdict.probabilities, abs=1e-6)
        with Image.open(io.BytesIO(after.trajectory or b"")) as strip:  # its stages have the picture's proportions
            assert strip.size == (2 + 3 * (12 + 2), 2 + 8 + 2)


@pytest.mark.parametrize(
    ("sampled", "finished", "size"),
    [((64, 64), (240, 320), (64, 85)), ((64, 64), (320, 240), (85, 64)), ((16, 16), (8, 16), (16, 32))],
)
def test_a_frame_has_the_pictures_proportions(
    sampled: tuple[int, int], finished: tuple[int, int], size: tuple[int, int]
) -> None:
    assert frame_size((3, *sampled), (3, *finished)) == size


class Picky(ToyJudge):
    """Finds the first label in bright pictures alone, and the second in very dark ones besides."""

    def probabilities(self, images: Tensor) -> Tensor:
        light = images.mean(dim=(1, 2, 3))
        found = torch.stack([light > -0.575, light < -0.6, *[torch.zeros_like(light)] * 2], dim=1)
        return 0.1 + 0.8 * found.float()


def picky() -> Engine:
    return Engine(FaultyStepper(network(), NoisePath(AB, "v")), Vocabulary(NAMES), Picky(), BatchSizes(8, 64))


def until_exact(index: int, attempts: int) -> Picture:
    options = PLAIN.model_copy(update={"until": "exact", "attempts": attempts})
    return replace(picture(index, options=options), last=attempts)


def drawn_alone(index: int, attempt: int) -> FinishedPicture:
    """The picture of an attempt's seed, as any request with that seed would get it."""
    one = picky()
    one.admit([replace(picture(index), seed=attempt_seed(1000 + index, attempt))])
    (outcome,) = run(one)
    assert isinstance(outcome, FinishedPicture)
    return outcome


def test_a_picture_is_drawn_until_it_is_exact_and_equals_the_plain_picture_of_that_seed() -> None:
    """Whatever else is in the batch, and with an end that is the best attempt where none is exact."""
    attempts, count, rows = 4, 12, 0
    plain = {(i, n): drawn_alone(i, n) for i in range(count) for n in range(1, attempts + 1)}
    expected = {}
    for i in range(count):
        verdicts = [plain[i, n].verdict for n in range(1, attempts + 1)]
        exact = [n for n, verdict in enumerate(verdicts, 1) if verdict.exact]
        best = max(range(1, attempts + 1), key=lambda n: (verdicts[n - 1].f1, verdicts[n - 1].accuracy))
        expected[i] = (exact[0], exact[0]) if exact else (best, attempts)
        rows += PLAIN.steps * expected[i][1]
    kept, drawn = ([pair[i] for pair in expected.values()] for i in (0, 1))
    assert {1, 2} <= set(drawn)  # some are exact at once, some later,
    assert any(not plain[i, kept[i]].verdict.exact for i in range(count))  # and some never
    for together in (True, False):
        one, outcomes = picky(), list[Outcome]()
        for i in range(count):
            one.admit([until_exact(i, attempts)])
            outcomes += one.step() if together else run(one)
        outcomes += run(one)
        assert one.stepper.network_rows == rows
        found = {outcome.picture.index: outcome for outcome in outcomes}
        assert len(found) == len(outcomes) == count
        for i, outcome in found.items():
            assert isinstance(outcome, FinishedPicture)
            verdict = outcome.verdict
            assert (verdict.attempt, len(verdict.attempts)) == expected[i]
            assert verdict.attempts[verdict.attempt - 1] == verdict.model_copy(update={"attempts": ()})
            assert [one.seed for one in verdict.attempts] == [attempt_seed(1000 + i, n + 1) for n in range(drawn[i])]
            assert np.abs(pixels(outcome) - pixels(plain[i, kept[i]])).max() <= 1


def test_the_kept_attempt_of_a_recipe_is_drawn_once_also_if_it_is_not_exact() -> None:
    options = PLAIN.model_copy(update={"until": "exact", "attempts": 4, "kept": (3,)})
    for index in range(4):
        one = picky()
        one.admit([replace(picture(index, options=options), attempt=3, last=3)])
        (outcome,) = run(one)
        assert isinstance(outcome, FinishedPicture)
        assert one.stepper.network_rows == PLAIN.steps
        assert np.array_equal(pixels(outcome), pixels(drawn_alone(index, 3)))
        assert (outcome.verdict.attempt, outcome.verdict.attempts) == (3, ())


def test_a_later_attempt_that_fails_alone_ends_its_picture_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was judged before a failure is judged again, and no attempt is counted twice."""
    one, draw, failing = picky(), Stepper.new_rows, set[int]()
    again = [i for i in range(12) if not drawn_alone(i, 1).verdict.exact]
    failing.add(attempt_seed(1000 + again[0], 2))

    def new_rows(self: Stepper, labels: Any, options: Any, seeds: list[int], *rest: Any) -> list[Row]:
        if failing & set(seeds):
            raise RuntimeError("no such noise")
        return draw(self, labels, options, seeds, *rest)

    monkeypatch.setattr(Stepper, "new_rows", new_rows)
    one.admit([until_exact(i, 3) for i in range(8)])
    outcomes = {outcome.picture.index: outcome for outcome in run(one)}
    assert [i for i, outcome in outcomes.items() if isinstance(outcome, Failed)] == [again[0]]
    for i in set(range(8)) - {again[0]}:
        outcome = outcomes[i]
        assert isinstance(outcome, FinishedPicture)
        seeds = [verdict.seed for verdict in outcome.verdict.attempts]
        assert seeds == [attempt_seed(1000 + i, n + 1) for n in range(len(seeds))]


def test_attempts_share_no_seed_with_other_pictures_of_the_job_or_the_next_seeds() -> None:
    seeds = [
        attempt_seed(picture_seed(seed, position), attempt)
        for seed in range(40)
        for position in range(32)
        for attempt in range(1, 17)
    ]
    assert len(set(seeds)) == len(seeds)
