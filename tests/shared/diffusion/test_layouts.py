"""Positions beside labels: prior over arrangements, the network's map, from file to checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from shared.diffusion.conditioning import PositionMap
from shared.diffusion.denoise import Stepper
from shared.diffusion.layouts import OUTSIDE, Layouts, with_positions
from shared.diffusion.model import load_denoiser
from shared.diffusion.schedules import alpha_bar
from shared.diffusion.unet import NetworkConfig, UNet
from shared.options import SamplingOptions
from shared.vocabulary import ICLEVR
from tests.trainer_fixtures import NETWORK, TINY, write_data_folder
from trainer.data import Dataset, load_dataset, merge
from trainer.errors import TrainerError
from trainer.loss import Denoising, DenoisingLoss
from trainer.runs import Budget
from trainer.scenes.render_folder import random_scenes, write_folder
from trainer.train import publish_network, starting_weights, train

LABELS = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1]])
POSITIONS = torch.tensor(
    [
        [[0.12, 0.22], [OUTSIDE, OUTSIDE], [OUTSIDE, OUTSIDE]],
        [[0.3, 0.4], [0.5, 0.6], [OUTSIDE, OUTSIDE]],
        [[OUTSIDE, OUTSIDE], [0.7, 0.8], [0.9, 0.1]],
    ]
)


def test_an_arrangement_is_one_that_was_seen_dealt_out_to_the_labels_asked() -> None:
    layouts = Layouts.of(POSITIONS, count=16)
    assert layouts.points.shape == (2, 16, 2, 2)
    assert torch.equal(layouts.points, Layouts.of(POSITIONS, count=16).points)  # the same data, the same checkpoint
    pairs = {((0.3, 0.4), (0.5, 0.6)), ((0.7, 0.8), (0.9, 0.1))}
    seen = set()
    for seed in range(64):
        drawn = layouts.draw(torch.tensor([1.0, 0, 1]), torch.Generator().manual_seed(seed))
        assert drawn[1].tolist() == [OUTSIDE, OUTSIDE]
        first, second = (tuple(round(v, 4) for v in drawn[k].tolist()) for k in (0, 2))
        seen.add((first, second))
    assert seen == pairs | {(b, a) for a, b in pairs}


def test_arrangements_in_which_objects_come_near_each_other_are_left_out() -> None:
    apart = [0.1, 0.2, 0.3, 0.4, 0.5]
    positions = torch.tensor([[[0.4, 0.5], [0.4 + d, 0.5]] for d in apart])
    points = Layouts.of(positions, count=64).points[1]
    left = {round(d, 3) for d in (points[:, 1] - points[:, 0]).norm(dim=1).tolist()}
    assert left == {0.3, 0.4, 0.5}


@pytest.mark.parametrize("labels", [[0.0, 0, 0], [1.0, 1, 1]])
def test_no_labels_and_more_labels_than_were_ever_seen_have_no_positions(labels: list[float]) -> None:
    drawn = Layouts.of(POSITIONS).draw(torch.tensor(labels), torch.Generator().manual_seed(0))
    assert bool((drawn == OUTSIDE).all())


def test_the_map_is_brightest_at_the_position_and_empty_for_what_is_absent_or_unknown() -> None:
    place = PositionMap(num_labels=3, channels=1)
    place.requires_grad_(False)
    torch.nn.init.ones_(place.vectors)
    spread = place(LABELS, POSITIONS, 20, 20)[:, 0]  # (3, H, W)
    assert divmod(int(spread[0].argmax()), 20) == (4, 2)
    assert float(spread[1].sum()) == pytest.approx(2 * float(spread[0].sum()), rel=0.1)
    assert float(place(LABELS, torch.full_like(POSITIONS, OUTSIDE), 20, 20).abs().max()) == 0
    assert float(place(0 * LABELS, POSITIONS, 20, 20).abs().max()) == 0


def test_the_map_has_the_dtype_of_its_vectors_and_the_networks_layout() -> None:
    place = PositionMap(num_labels=3, channels=4).requires_grad_(False)
    exact = place(LABELS, POSITIONS, 20, 20)
    assert exact.is_contiguous(memory_format=torch.channels_last)
    half = place.bfloat16()(LABELS, POSITIONS, 20, 20)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.02, rtol=0.02)


def network(positions: bool = True) -> UNet:
    torch.manual_seed(0)
    unet = UNet(NetworkConfig(num_labels=3, image_size=16, positions=positions, **NETWORK)).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


def test_positions_change_the_prediction_unless_labels_are_dropped() -> None:
    unet, x, t = network(), torch.randn(3, 3, 16, 16), torch.tensor([10, 500, 900])
    there, elsewhere = with_positions(LABELS, POSITIONS), with_positions(LABELS, 1 - POSITIONS)
    keep = torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        assert not torch.allclose(unet(x, t, there, keep), unet(x, t, elsewhere, keep))
        assert torch.equal(unet(x, t, there, ~keep), unet(x, t, elsewhere, ~keep))
        nowhere = with_positions(LABELS, torch.full_like(POSITIONS, OUTSIDE))
        torch.testing.assert_close(unet(x, t, nowhere, keep), unet(x, t, LABELS, keep))


def test_a_seed_fixes_noise_and_arrangement_and_the_noise_is_the_same_without_one() -> None:
    ab, layouts, options = alpha_bar("cosine", 50), Layouts.of(POSITIONS), SamplingOptions(steps=2)
    with_layouts, without = Stepper(network(), ab, "v", layouts=layouts), Stepper(network(False), ab, "v")
    one, again, other = (with_layouts.new_row([1, 1, 0], options, seed) for seed in (5, 5, 6))
    assert torch.equal(one.labels, again.labels)
    assert one.labels.shape == (3, 3)
    assert torch.equal(one.x, without.new_row([1, 1, 0], options, 5).x)
    assert not torch.equal(one.x, other.x)


def rendered(folder: Path) -> Dataset:
    write_folder(folder, random_scenes(6, 2, 0), seed=0, size=16)
    return load_dataset(folder, size=16)


def test_rendered_pictures_say_where_their_objects_are(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    assert dataset.positions is not None
    known = dataset.positions[..., 0] != OUTSIDE
    assert torch.equal(known, dataset.labels > 0)
    assert float(dataset.positions[known].min()) > 0
    assert float(dataset.positions[known].max()) < 1
    first = dataset.positions[dataset.labels.sum(1) == 1]
    assert first[first[..., 0] != OUTSIDE].unique(dim=0).shape == (1, 2)  # the first object stands at the origin


def test_positions_follow_a_picture_that_is_padded_to_a_square(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", random_scenes(1, 1, 0), seed=0, size=None)  # 320 x 240
    squeezed, padded = (load_dataset(tmp_path / "data", size=32, fit=fit).positions for fit in ("squeeze", "pad"))
    assert squeezed is not None
    assert padded is not None
    at = squeezed[..., 0] != OUTSIDE
    torch.testing.assert_close(padded[at][:, 0], squeezed[at][:, 0])
    torch.testing.assert_close(padded[at][:, 1], (squeezed[at][:, 1] * 240 + 40) / 320)


@pytest.mark.parametrize("content", ['{"a.png": [[0.5, 0.5]]}', "[]", '{"CLEVR_train_000000_0.png": [["left", 0]]}'])
def test_a_positions_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, content: str) -> None:
    folder = write_data_folder(tmp_path / "data")
    (folder / "positions.json").write_text(content)
    with pytest.raises(TrainerError, match=r"positions\.json"):
        load_dataset(folder, size=16)


def test_positions_in_pixels_are_refused(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "data")
    names = json.loads((folder / "train.json").read_text())
    (folder / "positions.json").write_text(json.dumps({name: [[0.5, 0.25]] for name in names}))
    assert load_dataset(folder, size=16).positions is not None
    (folder / "positions.json").write_text(json.dumps({name: [[8.0, 0.25]] for name in names}))
    with pytest.raises(TrainerError, match=r"_0\.png\" has \[8\.0, 0\.25\]; positions are fractions"):
        load_dataset(folder, size=16)


def test_folders_with_and_without_positions_do_not_mix(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    assert merge([dataset, dataset]).positions is not None
    with pytest.raises(TrainerError, match=r"positions\.json"):
        merge([dataset, Dataset(dataset.vocabulary, dataset.images, dataset.labels)])


def test_a_share_of_the_training_pictures_is_told_no_positions(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    config = TINY.model_copy(update={"position_dropout": 0.25})
    loss = DenoisingLoss(config, alpha_bar("cosine", 50), torch.device("cpu"))
    index = torch.arange(400) % len(dataset)
    labels = Denoising(dataset, loss, config).draw(index, slice(0, 400), torch.Generator().manual_seed(0))[1]
    assert labels.shape == (400, len(ICLEVR), 3)
    told = (labels[..., 1] != OUTSIDE).any(1).float().mean()
    assert 0.65 < float(told) < 0.85


def test_a_run_starts_from_a_network_without_positions_and_publishes_one_with(tmp_path: Path) -> None:
    dataset, storage = rendered(tmp_path / "data"), tmp_path / "storage"
    plain, told = TINY.model_copy(update={"positions": False}), TINY
    for config, name, start in ((plain, "plain", None), (told, "told", "plain")):
        weights = starting_weights(storage, start, config, dataset) if start else None
        averages, _ = train(
            dataset, config, tmp_path / name, Budget(steps=2), device=torch.device("cpu"), start=weights
        )
        publish_network(averages.network("raw"), config, dataset, storage, name, {})
    assert load_denoiser(storage / "plain.safetensors").layouts is None
    denoiser = load_denoiser(storage / "told.safetensors")
    assert denoiser.layouts is not None
    assert denoiser.layouts.points.shape[0] == 2
    row = denoiser.stepper().new_row(ICLEVR.multi_hot(["red cube"]), SamplingOptions(), 0)
    want = json.loads((tmp_path / "data/positions.json").read_text())["CLEVR_train_000000_0.png"][0]
    assert row.labels[ICLEVR.index("red cube"), 1:].tolist() == pytest.approx(want, abs=0.004)  # bf16
