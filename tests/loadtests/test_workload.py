"""The requests of a load test: who asks for what, and that a seed repeats it."""

from collections import Counter
from itertools import islice

import pytest

from loadtests.workload import LONGEST, SHORTEST, Job, Served, Workload, popularity
from server.api.schemas import GenerateRequest

SERVED = Served(tuple(f"voice{i}" for i in range(20)), 1024)


def jobs(workload: Workload, count: int, user: int = 0) -> list[Job]:
    return list(islice(workload.jobs(user), count))


def test_the_adapters_follow_the_power_law() -> None:
    workload = Workload(SERVED, seed=1, skew=1.0, base_share=0.1)
    count = 20_000
    asked = Counter(job.adapter for job in jobs(workload, count))
    assert abs(asked[None] / count - 0.1) < 0.01
    for name, share in zip(workload.adapters, popularity(20, 1.0), strict=True):
        assert abs(asked[name] / count - 0.9 * share) < 0.015, name
    assert asked[workload.adapters[0]] > 10 * asked[workload.adapters[-1]]


def test_popularity_is_a_distribution() -> None:
    assert popularity(4, 0.0) == [0.25] * 4
    assert popularity(0, 1.0) == []
    shares = popularity(1000, 1.5)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10**1.5)


def test_a_seed_repeats_every_users_requests() -> None:
    again = Workload(SERVED, seed=7)
    first = [jobs(Workload(SERVED, seed=7), 50, user) for user in range(3)]
    assert [jobs(again, 50, user) for user in reversed(range(3))] == first[::-1]
    assert first[0] != first[1]
    assert jobs(Workload(SERVED, seed=8), 50) != first[0]
    assert Workload(SERVED, seed=8).adapters != again.adapters


def test_every_kind_of_request_occurs_and_fits_the_schema() -> None:
    drawn = jobs(Workload(SERVED), 2000)
    for job in drawn:
        GenerateRequest.model_validate(job.body())
        assert SHORTEST <= job.max_new_tokens <= LONGEST
    assert {"do_sample" in job.sampling for job in drawn} == {True, False}
    assert {"stop" in job.sampling for job in drawn} == {True, False}
    assert {job.ignore_eos for job in drawn} == {True, False}


def test_short_models_and_models_without_adapters_are_asked_for_what_they_have() -> None:
    drawn = jobs(Workload(Served((), 40)), 200)
    assert {job.adapter for job in drawn} == {None}
    assert {job.max_new_tokens for job in drawn} == {8}


def test_the_listing_is_read_or_refused() -> None:
    base = {"id": "demo", "parent": None, "max_model_len": 256}
    voice = {"id": "wilde", "parent": "demo", "max_model_len": 256}
    assert Served.read({"data": [base, voice]}) == Served(("wilde",), 256)
    for wrong in ({"data": []}, {"data": [base, base]}, {"data": [{"id": "x"}]}, {"error": "no"}, [], None):
        with pytest.raises(ValueError, match="does not list one base"):
            Served.read(wrong)


@pytest.mark.parametrize("wrong", [{"skew": -1.0}, {"base_share": 1.5}])
def test_a_distribution_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 or more and 0 to 1"):
        Workload(SERVED, **wrong)
