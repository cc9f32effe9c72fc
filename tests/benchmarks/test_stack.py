"""The service that benchmarks run: an error in a measurement says what its processes did."""

import pytest

from benchmarks.stack import NotUp, stack


def test_an_error_shows_which_process_has_ended_and_its_log() -> None:
    with pytest.raises(NotUp) as failed, stack(workers=0) as running:
        running.start_workers(1, LABELGRID_STORAGE="nowhere")
    (note,) = failed.value.__notes__
    assert "worker 0 has ended with 1" in note
    assert "worker-0.log ends with:" in note
