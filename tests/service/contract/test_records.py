"""Records: the pictures of a job, and that a stored job reads back unchanged."""

from hypothesis import given
from hypothesis import strategies as st

from service.contract.records import JobRecord
from shared.options import SamplingOptions, picture_seed
from tests.service.contract.strategies import layouts
from tests.service.store.helpers import record
from tests.shared.test_options import sampling_options
from tests.shared.test_vocabulary import good_lists


@given(good_lists, sampling_options, st.integers(0, 2**53 - 1), st.integers(1, 3), st.data())
def test_a_job_record_reads_back_unchanged(
    lists: list[list[str]], options: SamplingOptions, seed: int, repeats: int, data: st.DataObject
) -> None:
    places = data.draw(st.none() | st.tuples(*(st.none() | layouts for _ in lists)).map(list))
    stored = JobRecord(
        id="a",
        kind="score",
        created_at=0.1,
        model="m",
        digest="d",
        labels=lists,
        layouts=places,
        seed=seed,
        repeats=repeats,
        columns=8,
        options=options,
    )
    read = JobRecord.model_validate_json(stored.model_dump_json())
    assert read == stored
    assert list(read.pictures()) == list(stored.pictures())
    assert [picture.index for picture in read.pictures()] == list(range(read.total))


def test_each_repeat_has_the_seeds_of_a_separate_request() -> None:
    job = record(3, repeats=2, seed=40)
    assert [(p.index, p.seed) for p in job.pictures()] == [
        (r * 3 + i, picture_seed(40 + r, i)) for r in range(2) for i in range(3)
    ]
