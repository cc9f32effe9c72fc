"""The layout network's training: what it learns, and that it resumes."""

from pathlib import Path

import pytest
import torch

from shared.vocabulary import Vocabulary
from tests.trainer.test_positions import rendered
from tests.trainer_fixtures import TINY
from trainer.data import Dataset
from trainer.runs import Run
from trainer.stages.fit_layouts import fit_layouts


def test_the_layout_network_learns_which_label_stands_where(tmp_path: Path) -> None:
    """The sky is above the boat; both may stand anywhere else."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, count = Vocabulary(("sky", "boat")), 600
    labels = torch.ones(count, 2)
    heights = torch.rand(count, 2, generator=generator).sort(1).values  # y from the top: the sky's is the smaller
    positions = torch.stack([torch.rand(count, 2, generator=generator), heights], -1)
    dataset = Dataset(vocabulary, torch.zeros(count, 3, 16, 16, dtype=torch.uint8), labels, positions)
    config = TINY.model_copy(update={"layout_steps": 200})
    network = fit_layouts(dataset, config, tmp_path)
    assert network is not None
    drawn = torch.stack([network.draw(labels[0], generator) for _ in range(300)])
    assert float((drawn[:, 0, 1] < drawn[:, 1, 1]).float().mean()) >= 0.75


def test_a_layout_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    dataset = rendered(tmp_path / "data")
    config = TINY.model_copy(update={"layout_steps": 4})
    whole = fit_layouts(dataset, config, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(run: Run) -> None:
        if run.step == 2:
            raise Stop

    with pytest.raises(Stop):
        fit_layouts(dataset, config, tmp_path / "parts", on_step=stop)
    again = fit_layouts(dataset, config, tmp_path / "parts")
    finished = fit_layouts(dataset, config, tmp_path / "parts", on_step=lambda _: pytest.fail("nothing is left to do"))
    assert whole is not None
    assert again is not None
    assert finished is not None
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, finished.state_dict()[name])
