"""Ids of jobs: they are UUIDs of version 7 that sort by time and say the hour."""

from uuid import RFC_4122, UUID

from service.contract.job_ids import HOUR, ID, LAST_MS, created_at, hour_of, new_job_id


def test_an_id_is_a_uuid_of_version_7_with_the_time_in_it() -> None:
    one = UUID(new_job_id(1767268800.123))
    assert (one.version, one.variant) == (7, RFC_4122)
    assert created_at(one.hex) == 1767268800.123


def test_ids_sort_by_time_and_say_the_hour() -> None:
    times = [1767268800.0, 1767268800.001, 1767272399.999, 1767272400.0]
    ids = [new_job_id(time) for time in times]
    assert ids == sorted(ids)
    assert [hour_of(one) for one in ids] == ["2026-01-01T12"] * 3 + ["2026-01-01T13"]
    assert len({new_job_id(0.0) for _ in range(100)}) == 100
    assert all(ID.fullmatch(one) for one in ids)


def test_any_id_of_the_right_form_has_a_time() -> None:
    made_up = "f" * 12 + "7" + "0" * 19
    assert (created_at(made_up), hour_of(made_up)) == (LAST_MS / 1000, "9999-12-31T23")
    assert [bool(HOUR.fullmatch(name)) for name in (hour_of(made_up), "backup", "2026-01-31T17.old")] == [1, 0, 0]
