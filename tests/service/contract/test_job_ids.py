"""Ids of jobs: they are UUIDs of version 7 that sort by time and say the hour."""

from uuid import RFC_4122, UUID

from service.contract.job_ids import ID, UNDATED, hour_of, new_job_id


def test_an_id_is_a_uuid_of_version_7_with_the_time_in_it() -> None:
    one = UUID(new_job_id(1767268800.123))
    assert (one.version, one.variant) == (7, RFC_4122)
    assert one.int >> 80 == 1767268800123


def test_ids_sort_by_time_and_say_the_hour() -> None:
    times = [1767268800.0, 1767268800.001, 1767272399.999, 1767272400.0]
    ids = [new_job_id(time) for time in times]
    assert ids == sorted(ids)
    assert [hour_of(one) for one in ids] == ["2026-01-01T12"] * 3 + ["2026-01-01T13"]
    assert len({new_job_id(0.0) for _ in range(100)}) == 100
    assert all(ID.fullmatch(one) for one in ids)


def test_other_ids_have_no_hour() -> None:
    assert hour_of("5f0c9e1a7d3b4c2e8a6f1b0d9c8e7f6a") == UNDATED  # version 4, as earlier releases made
    assert hour_of("ffffffffffff7" + "0" * 19) == UNDATED  # after the year 9999
