"""Records: the pictures of a job."""

from shared.options import picture_seed
from tests.service.store.helpers import record


def test_each_repeat_has_the_seeds_of_a_separate_request() -> None:
    job = record(3, repeats=2, seed=40)
    assert [(p.index, p.seed) for p in job.pictures()] == [
        (r * 3 + i, picture_seed(40 + r, i)) for r in range(2) for i in range(3)
    ]
