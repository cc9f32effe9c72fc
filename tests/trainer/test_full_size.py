"""Pictures of a folder at full size: their own, or the one asked for."""

from pathlib import Path

import pytest
from PIL import Image

from tests.trainer_fixtures import write_data_folder
from trainer.errors import TrainerError
from trainer.full_size import as_tensor, find_pictures


def test_pictures_have_the_size_of_the_first_or_the_one_asked_for(tmp_path: Path) -> None:
    folder = write_data_folder(tmp_path / "data", pictures=3, width=32, height=24)
    Image.new("RGB", (64, 48), "red").save(folder / "iclevr" / "CLEVR_train_000002_0.png")
    own = find_pictures([folder], None)
    assert own.size == (32, 24)
    assert [own.read(i).size for i in range(3)] == [(32, 24)] * 3
    assert own.read(2).getpixel((5, 5)) == (255, 0, 0)
    asked = find_pictures([folder], "20x12")
    assert as_tensor(asked.read(0)).shape == (3, 12, 20)


@pytest.mark.parametrize("size", ["20", "20x", "0x12", "20X12", "20x12x3", "99999x1"])
def test_other_forms_of_a_size_are_refused(tmp_path: Path, size: str) -> None:
    folder = write_data_folder(tmp_path / "data", pictures=1)
    with pytest.raises(TrainerError, match=f'--size "{size}" is not of the form 320x240'):
        find_pictures([folder], size)
