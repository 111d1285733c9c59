"""The router's way to its workers: whatever fails, the rows are those of one process, or the token fails alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.group import WorkerGroup
from experts.pool import DispatchBatch
from experts.roster import Roster
from tests.unit.fake_links import HIDDEN, NUM_EXPERTS, Clock, FakeLink, attached_roster, random_weights, view

WEIGHTS = random_weights()
TABLE = kernels.ExpertTable(WEIGHTS, NUM_EXPERTS)
ALL = tuple(range(NUM_EXPERTS))


class FakeLoader:
    """Gives the experts to one survivor when it is asked, or never."""

    def __init__(self, roster: Roster, links: dict[str, FakeLink], survivor: str | None) -> None:
        self._roster, self._links, self._survivor = roster, links, survivor
        self.wanted: list[int] = []
        self.loads = 0

    def want(self, layer: int) -> None:
        self.wanted.append(layer)
        if self._survivor is not None:
            member = next(m for m in self._roster.members if m.name == self._survivor)
            self._links[self._survivor].held |= set(ALL)
            self._roster.loaded(member, [(layer, e) for e in ALL])


class Pool:
    """Workers a, b, c ... with the experts of layer 0, and the group under test."""

    def __init__(self, held: Sequence[Sequence[int]], survivor: str | None = None, **link: int) -> None:
        self.clock = Clock()
        names = "abcdefgh"[: len(held)]
        self.links = {name: FakeLink(self.clock, WEIGHTS, mine, **link) for name, mine in zip(names, held, strict=True)}
        placement = {0: [[n for n, mine in zip(names, held, strict=True) if e in mine] for e in ALL]}
        self.roster = attached_roster(self.links, view(placement, names), self.clock)
        self.loader = FakeLoader(self.roster, self.links, survivor)
        self.group = WorkerGroup(self.roster, self.loader, self.clock)  # type: ignore[arg-type]
        self.step = 0

    def run(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        self.step += 1
        return self.group.combine(self.group.dispatch(DispatchBatch(self.step, 0, *batch)))

    def member(self, name: str) -> object:
        return next(m for m in self.roster.members if m.name == name)


@contextmanager
def pool(*held: Sequence[int], survivor: str | None = None, **link: int) -> Iterator[Pool]:
    made = Pool(held, survivor, **link)
    try:
        yield made
    finally:
        made.roster.close()


def batch(num_tokens: int = 5, k: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    weights, ids = scores.topk(k)
    return hidden, ids.int(), weights.contiguous()


def assert_same_cup(result: tuple[torch.Tensor, torch.Tensor], work: tuple[torch.Tensor, ...]) -> None:
    rows, failed = kernels.moe(*work, TABLE)
    assert not failed.any()
    assert not result[1].any()
    assert result[0].numpy().tobytes() == rows.numpy().tobytes()


FAULTS = ("", "", "late", "down", "down_on_send", "nan", "failed", "not_held")


@settings(max_examples=60, deadline=None)
@given(
    replicas=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    faults=st.lists(st.lists(st.sampled_from(FAULTS), max_size=4), min_size=3, max_size=3),
    num_tokens=st.integers(1, 12),
    max_rows=st.integers(1, 12),
    depth=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_whatever_some_workers_do_the_rows_are_those_of_one_process(
    replicas: list[set[int]], faults: list[list[str]], num_tokens: int, max_rows: int, depth: int, seed: int
) -> None:
    held = [[e for e in ALL if worker in replicas[e]] for worker in range(3)]
    with pool(*held, ALL, max_rows=max_rows, depth=depth) as made:  # the last worker holds all, and is well
        for name, list_of_faults in zip("abc", faults, strict=True):
            made.links[name].faults.extend(list_of_faults)
        for step in range(3):
            work = batch(num_tokens, seed=seed + step)
            assert_same_cup(made.run(work), work)


def test_each_pair_goes_to_one_worker_and_only_there() -> None:
    with pool((0, 1, 2), (3, 4, 5)) as made:
        work = batch(8)
        assert_same_cup(made.run(work), work)
        pairs = sum(request.num_pairs for link in made.links.values() for request in link.requests)
        assert pairs == work[1].numel()


def test_only_the_missing_rows_are_sent_again() -> None:
    with pool((0, 1, 2), (3, 4, 5), ALL) as made:
        made.links["a"].faults.append("down")
        work = batch(8)
        assert_same_cup(made.run(work), work)
        requests = [request for name in "bc" for request in made.links[name].requests]
        assert sum(request.num_pairs for request in requests) == work[1].numel()
        assert made.group.counters.resends == 1


def test_a_late_answer_is_dropped_and_its_worker_is_used_again_after_a_while() -> None:
    with pool(ALL, ALL) as made:
        made.links["a"].faults.append("late")
        for seed in range(4):
            work = batch(seed=seed)
            assert_same_cup(made.run(work), work)
        asked = len(made.links["a"].requests)
        assert asked == 1  # suspect: nothing more is sent to it
        made.links["a"].let_go()
        made.clock.now += 5
        for seed in range(4):
            work = batch(seed=seed)
            assert_same_cup(made.run(work), work)
        assert len(made.links["a"].requests) > asked


def test_a_worker_that_hangs_costs_its_deadline_once() -> None:
    with pool(ALL, ALL) as made:
        for seed in range(40):
            made.run(batch(seed=seed))
        made.links["a"].faults.append("late")
        before = made.clock.now
        for seed in range(10):
            made.run(batch(seed=seed))
        assert made.clock.now - before < 0.1


def test_a_worker_slowed_twentyfold_is_left_after_a_few_answers() -> None:
    with pool(ALL, ALL) as made:
        for link in made.links.values():
            link.delay = 0.002
        for seed in range(40):
            made.run(batch(seed=seed))
        made.links["a"].delay = 0.04
        before = made.clock.now
        for seed in range(30):
            work = batch(seed=seed)
            assert_same_cup(made.run(work), work)
        assert made.clock.now - before < 0.5
        assert made.group.counters.hedges > 0


def test_a_slow_worker_is_left_alone_and_those_that_were_looked_at_after_it_are_not() -> None:
    with pool(ALL, ALL, ALL, ALL, ALL) as made:
        for link in made.links.values():
            link.delay = 0.001
        for seed in range(40):
            made.run(batch(12, seed=seed))
        made.group._flights.budget.take = lambda: False  # type: ignore[method-assign]
        made.links["c"].delay = 0.02
        suspects = set()
        for seed in range(12):
            work = batch(12, seed=seed)
            assert_same_cup(made.run(work), work)
            suspects |= {m.name for m in made.roster.members if m.liveness.suspect(made.clock.now, 0)}
        assert suspects == {"c"}


def test_an_engine_that_was_away_holds_nothing_against_its_workers() -> None:
    with pool(ALL, ALL) as made:
        for seed in range(40):
            made.run(batch(seed=seed))
        made.group._flights.budget.take = lambda: False  # type: ignore[method-assign]
        made.links["a"].delay = 0.012  # not in time for its hedge
        attend = made.group._recovery._attend
        stalls = [5.0] * 3

        def stall(*args: object) -> None:
            made.clock.now += stalls.pop() if stalls else 0.0
            attend(*args)  # type: ignore[arg-type]

        made.group._recovery._attend = stall  # type: ignore[method-assign, assignment]
        for seed in range(3):
            work = batch(seed=seed)
            assert_same_cup(made.run(work), work)
        assert not stalls
        assert not any(m.liveness.suspect(made.clock.now, 0) for m in made.roster.members)
        assert made.group.counters.resends == 0


def test_a_worker_that_gives_nan_is_asked_no_more_for_a_while() -> None:
    with pool(ALL, ALL) as made:
        made.links["a"].faults.extend(["nan"] * 50)
        for seed in range(5):
            work = batch(seed=seed)
            assert_same_cup(made.run(work), work)
        assert made.group.counters.nonfinite_rows == 1
        assert len(made.links["a"].requests) == 1


def test_rows_that_are_nan_everywhere_fail_their_token_alone() -> None:
    with pool(ALL, ALL) as made:
        hidden, ids, weights = batch(6)
        hidden[2, 3] = float("nan")
        rows, failed = made.run((hidden, ids, weights))
        assert failed.tolist() == [token == 2 for token in range(6)]
        assert not rows[2].any()
        expected, _ = kernels.moe(hidden, ids, weights, TABLE)
        assert torch.equal(rows, expected)
        assert len(made.links["a"].requests) + len(made.links["b"].requests) <= 2  # nobody was asked again


def test_nan_from_the_only_worker_fails_the_tokens_that_need_it_and_no_other() -> None:
    with pool((0, 1, 2), (3, 4, 5)) as made:
        made.links["a"].faults.append("nan")
        work = batch(8, k=1)
        rows, failed = made.run(work)
        last = max(t for t in range(8) if work[1][t, 0] < 3)
        assert failed.tolist() == [token == last for token in range(8)]
        assert made.group.unavailable(made.step) is None
        expected, _ = kernels.moe(*work, TABLE)
        expected[last] = 0
        assert torch.equal(rows, expected)


def test_what_nobody_holds_is_loaded_by_a_survivor() -> None:
    with pool((0, 1, 2), (3, 4, 5), survivor="b") as made:
        made.links["a"].faults.append("down")
        work = batch(8)
        assert_same_cup(made.run(work), work)
        assert made.loader.wanted


def test_a_hung_worker_without_a_replica_is_given_up_for_a_survivor() -> None:
    with pool((0, 1, 2), (3, 4, 5), survivor="b") as made:
        made.links["a"].faults.append("late")
        before = made.clock.now
        work = batch(8)
        assert_same_cup(made.run(work), work)
        assert made.clock.now - before < 5


def test_past_the_limit_only_the_tokens_fail_that_need_the_missing_expert() -> None:
    with pool((0, 1, 2), (3, 4, 5)) as made:
        made.links["a"].faults.append("down")
        work = batch(8, k=2)

        def tick(seconds: float) -> None:
            made.clock.now += 1.0

        made.roster.wait_changed = tick  # type: ignore[method-assign]
        rows, failed = made.run(work)
        assert failed.tolist() == (work[1] < 3).any(dim=1).tolist()
        assert made.group.unavailable(made.step).tolist() == failed.tolist()  # type: ignore[union-attr]
        assert made.group.unavailable(made.step + 1) is None
        assert not rows[failed].any()
        expected, _ = kernels.moe(*work, TABLE)
        assert torch.equal(rows[~failed], expected[~failed])


@pytest.mark.parametrize("fault", ["down", "late"])
def test_an_outage_is_waited_for_once_and_not_in_each_layer(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.recovery.LOAD_SECONDS", 2.0)
    with pool((0, 1, 2), (3, 4, 5)) as made:
        made.member("a").attaching = True  # nobody brings it back
        made.links["a"].faults.append(fault)

        def tick(seconds: float) -> None:
            made.clock.now += 0.1

        made.roster.wait_changed = tick  # type: ignore[method-assign]
        few = batch(8, k=2)
        few[1][few[1] == 2] = 3  # an expert of the same worker that nobody has asked for yet
        _, failed = made.run(few)
        assert failed.tolist() == (few[1] < 3).any(dim=1).tolist()
        before, wanted = made.clock.now, len(made.loader.wanted)
        for seed in range(5):
            work = batch(8, k=2, seed=seed)
            rows, failed = made.run(work)
            assert failed.tolist() == (work[1] < 3).any(dim=1).tolist()
            expected, _ = kernels.moe(*work, TABLE)
            assert torch.equal(rows[~failed], expected[~failed])
        assert made.clock.now - before < 0.1
        assert len(made.loader.wanted) > wanted  # but not forgotten
        made.links["b"].held |= set(ALL)
        made.roster.loaded(made.member("b"), [(0, e) for e in ALL])  # type: ignore[arg-type]
        assert_same_cup(made.run(work), work)


@pytest.mark.parametrize("fault", ["down", "failed", "nan", "not_held"])
def test_the_next_layer_is_not_disturbed(fault: str) -> None:
    with pool(ALL, ALL, ALL) as made:
        made.links["b"].faults.append(fault)
        for seed in range(6):
            work = batch(seed=seed)
            assert_same_cup(made.run(work), work)


def test_an_expert_that_fails_everywhere_takes_no_other_pair_with_it() -> None:
    with pool((0, 1, 2), (1, 2, 3, 4, 5)) as made:
        made.links["a"].faults.append("failed")
        made.links["b"].delay = 0.02
        work = batch(8, k=2)
        rows, failed = made.run(work)
        assert failed.tolist() == (work[1] == 0).any(dim=1).tolist()
        expected, _ = kernels.moe(*work, TABLE)
        assert torch.equal(rows[~failed], expected[~failed])


@pytest.mark.parametrize("fault", ["failed", "nan"])
def test_a_replica_that_is_away_for_a_moment_is_asked_when_it_is_back(fault: str) -> None:
    with pool(ALL, ALL) as made:
        made.member("b").attaching = True  # nobody else brings it back
        made.links["b"].close()
        made.links["a"].faults.append(fault)

        def back(seconds: float) -> None:
            made.links["b"]._down = False
            made.roster.lost(made.member("b"))  # a change, as attaching is

        made.roster.wait_changed = back  # type: ignore[method-assign]
        work = batch(8)
        assert_same_cup(made.run(work), work)


@pytest.mark.parametrize("fault", ["failed", "nan"])
def test_a_replica_that_stays_away_is_waited_for_a_second_at_most(fault: str) -> None:
    with pool(ALL, ALL) as made:
        made.member("b").attaching = True
        made.links["b"].close()
        made.links["a"].faults.append(fault)

        def tick(seconds: float) -> None:
            made.clock.now += 0.1

        made.roster.wait_changed = tick  # type: ignore[method-assign]
        before = made.clock.now
        _, failed = made.run(batch(8))
        assert failed.any()
        assert made.clock.now - before < 1.5


def test_a_worker_that_hangs_right_after_its_start_is_hedged_whatever_the_budget() -> None:
    with pool(ALL, ALL) as made:
        made.group._flights.budget.take = lambda: False  # type: ignore[method-assign]
        made.links["a"].faults.append("late")
        before = made.clock.now
        work = batch(8)
        assert_same_cup(made.run(work), work)
        assert made.clock.now - before < 0.2


def test_a_wire_that_breaks_between_two_parts_costs_no_step() -> None:
    with pool(ALL, ALL, max_rows=2, depth=1) as made:
        made.links["a"].faults.extend(["", "down_on_send"])
        work = batch(12)
        assert_same_cup(made.run(work), work)
        assert made.links["a"].down


@pytest.mark.parametrize("fault", ["failed", "not_held"])
def test_once_a_part_is_refused_the_others_are_not_sent(fault: str) -> None:
    with pool(ALL, ALL, max_rows=2, depth=1) as made:
        made.links["a"].faults.append(fault)
        work = batch(12)
        assert_same_cup(made.run(work), work)
        assert sum(request.attempt == 0 for request in made.links["a"].requests) == 1


def test_a_placement_is_in_use_before_anybody_is_chosen_by_it() -> None:
    with pool(ALL, ALL) as made:
        routing, in_use = made.roster.routing, []

        def watched(layer: int, now: float) -> object:
            in_use.append(made.group.placement_in_use)
            return routing(layer, now)

        made.roster.routing = watched  # type: ignore[method-assign, assignment]
        made.run(batch())
        assert in_use == [made.roster.placement]
        assert made.group.placement_in_use is None


def test_a_worker_that_is_quarantined_time_and_again_is_hedged_within_the_budget() -> None:
    with pool(ALL, ALL) as made:
        for seed in range(60):
            made.run(batch(seed=seed))
        asked = 0

        def none_left() -> bool:
            nonlocal asked
            asked += 1
            return False

        made.group._flights.budget.take = none_left  # type: ignore[method-assign]
        before = made.group.counters.hedges
        for seed in range(5):
            made.member("a").liveness.quarantine(made.clock.now)  # type: ignore[attr-defined]
            made.clock.now += 100.0
            made.links["a"].delay = 0.3
            work = batch(seed=seed)
            assert_same_cup(made.run(work), work)
        assert asked > 0
        assert made.group.counters.hedges == before
