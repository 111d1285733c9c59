"""The controller's state machine against simulated workers: what it tells them, what it publishes, what it refuses."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from barista.placement import ExpertKey
from barista.v1 import experts_pb2
from experts.controller.commands import (
    STALL_SECONDS,
    Command,
    Refused,
    begin_drain,
    begin_drain_node,
    begin_rebalance,
    begin_scale,
)
from experts.controller.lease import LEASE_SECONDS, Lease
from experts.controller.member import Description, Reach
from experts.controller.picture import PROOFS_SECONDS
from experts.controller.planning import GRACE_SECONDS, START_SECONDS, problem, tend
from experts.controller.reconcile import (
    HUNG_SECONDS,
    RETURN_SECONDS,
    SILENT_SECONDS,
    Action,
    Assign,
    Move,
    Probe,
    Release,
    Restart,
    Stop,
    ended,
    is_settled,
    next_actions,
)
from experts.controller.retirement import RETRY_SECONDS, retire_failing
from experts.controller.state import MISSES_UNTIL_LOST, TIMEOUTS_UNTIL_LOST, Pool, PoolSettings
from experts.controller.wire import by_layer, pool_state, probe_row
from experts.health.verdict import HEALTHY, Condition, Verdict

SIZE = 100
MODEL = b"model"
HOT = Verdict(Condition.THERMAL, 0.5, "GPU 0: hot.")
BROKEN = Verdict(Condition.FATAL, 0.0, "GPU 0: XID 79.")


def digest(key: ExpertKey) -> bytes:
    return f"weights {key}".encode()


@dataclass
class FakeWorker:
    """What a worker process really is, whatever the controller believes."""

    name: str
    capacity: int
    life: int = 1
    alive: bool = True
    numerics_id: str = "avx2"
    model_digest: bytes = MODEL
    protocol_version: int = 1
    term: int = 0
    epoch: int = 0
    held: dict[ExpertKey, bytes] = field(default_factory=dict)
    verdict: Verdict = HEALTHY

    def restart(self, verdict: Verdict = HEALTHY) -> None:
        self.life += 1
        self.alive = True
        self.held = {}
        self.verdict = verdict

    def describe(self) -> Description:
        return Description(
            pid=self.life,
            incarnation=f"{self.name} {self.life}",
            numerics_id=self.numerics_id,
            model_digest=self.model_digest,
            protocol_version=self.protocol_version,
            capacity_bytes=self.capacity,
            held=dict(self.held),
            term=self.term,
            epoch=self.epoch,
            verdict=self.verdict,
        )


class World:
    """A pool, its workers, and the actions that are under way between them."""

    def __init__(self, workers: int, *, experts: int = 6, capacity: int = 12 * SIZE, redundancy: int = 2) -> None:
        self.now = 0.0
        self.capacity = capacity
        self.pool = Pool(
            PoolSettings(
                name=None,
                model_digest=MODEL,
                layers={0: experts, 3: experts},
                expert_bytes={0: SIZE, 3: SIZE},
                redundancy=redundancy,
            )
        )
        self.workers: dict[str, FakeWorker] = {}
        self.under_way: list[Action] = []
        self.replaced: list[Action] = []
        self.add(self.pool.add(workers, self.now))

    def add(self, names: list[str]) -> None:
        self.workers.update((name, FakeWorker(name, self.capacity)) for name in names)

    def describe(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker is not None and worker.alive:
            self.pool.described(name, worker.describe(), self.now)
        elif worker is not None:
            self.pool.unreachable(name, "gone", self.now)

    def step(self) -> None:
        tend(self.pool, self.now)
        retire_failing(self.pool, self.now)
        self.under_way += next_actions(self.pool, self.now)

    def carry_out(self, action: Action) -> None:
        """As a worker would, if it is still the same one; otherwise the action comes to nothing."""
        if isinstance(action, Restart | Move):
            self.replaced.append(action)
            self.kill(action.worker)
            self.workers[action.worker].restart()
            ended(self.pool, action, "", self.now)
            return
        if isinstance(action, Stop):
            del self.workers[action.worker]
            self.pool.remove(action.worker, self.now)
            return
        worker = self.workers.get(action.worker)
        same = worker is not None and worker.alive and worker.describe().incarnation == action.incarnation
        match action:
            case Assign():
                if same:
                    assert worker is not None
                    worker.held |= {key: digest(key) for key in action.experts}
                    assert len(worker.held) * SIZE <= worker.capacity
                    worker.term, worker.epoch = self.pool.term, self.pool.epoch
                    loaded = {key: digest(key) for key in action.experts}
                    self.pool.loaded(action.worker, action.incarnation, loaded, self.now)
                error = "" if same else "broken"
                self.pool.assign_ended(action.worker, action.incarnation, error, self.now)
            case Probe():
                if same:
                    self.pool.proved(action.worker, action.incarnation, action.expert, "", self.now)
                else:
                    self.pool.probe_failed(action.worker, action.incarnation, action.expert)
            case Release():
                if same:
                    assert worker is not None
                    for key in action.experts:
                        worker.held.pop(key, None)
                    worker.term, worker.epoch = self.pool.term, self.pool.epoch
                    self.pool.released(action.worker, action.incarnation, action.experts)
                else:
                    self.pool.release_failed(action.worker, action.incarnation, action.experts, self.now)

    def run(self, rounds: int = 40, seconds: float = 1.0) -> None:
        """Let everything that is under way come to its end."""
        for _ in range(rounds):
            self.now += seconds
            for name in list(self.workers):
                self.describe(name)
            self.step()
            while self.under_way:
                self.carry_out(self.under_way.pop(0))

    def says(self, engine: str, epoch: int | None = None, tokens: dict[ExpertKey, int] | None = None) -> None:
        """An engine that uses the newest placement, or an older one of this controller."""
        epoch = self.pool.epoch if epoch is None else epoch
        self.pool.engine_said(engine, self.pool.term, epoch, tokens or {}, self.now)

    def succeed(self) -> None:
        """Another controller comes, which knows only the names of the workers."""
        self.pool = Pool(self.pool.settings, self.now, found=list(self.workers))
        self.under_way.clear()

    def kill(self, name: str) -> None:
        self.workers[name].alive = False
        for _ in range(MISSES_UNTIL_LOST):
            self.describe(name)

    def finish(self, command: Command) -> None:
        self.add(command.started)
        for _ in range(40):
            if command.is_over(self.now):
                return
            self.run(1)
        raise AssertionError("the command does not end")

    def replicas(self) -> list[int]:
        return [len(names) for names in self.pool.placement.replicas.values()]


def ready(workers: int, **changes: int) -> World:
    world = World(workers, **changes)
    world.run()
    assert world.pool.settled
    assert coverage(world) == 1
    return world


def coverage(world: World) -> float:
    return pool_state(world.pool).coverage


def named_at(world: World, worker: str) -> set[ExpertKey]:
    """The experts that the published placement names at a worker."""
    return {key for key, names in world.pool.placement.replicas.items() if worker in names}


def word(world: World, name: str) -> str:
    from barista.v1 import controller_pb2 as pb

    state = next(worker.state for worker in pool_state(world.pool).workers if worker.name == name)
    return pb.WorkerState.Name(state).removeprefix("WORKER_STATE_")


# ---------------------------------------------------------------- the start


def test_the_first_placement_covers_every_expert_with_the_redundancy_that_fits() -> None:
    world = ready(3)
    assert world.replicas() == [2] * 12
    assert [word(world, name) for name in world.workers] == ["READY"] * 3
    assert world.pool.moves == 0
    assert problem(world.pool) == ""


def test_experts_that_nobody_holds_are_loaded_before_redundant_replicas() -> None:
    world = World(2)
    for name in world.workers:
        world.describe(name)
    world.step()
    first = [key for action in world.under_way if isinstance(action, Assign) for key in action.experts]
    assert sorted(first) == sorted(world.pool.target)


def test_the_first_plan_waits_for_slow_starters_but_not_for_ever() -> None:
    world = World(2)
    world.describe("worker-0")
    world.step()
    assert not world.pool.planned_for
    world.now += START_SECONDS + 1
    world.step()
    assert world.pool.planned_for == {"worker-0"}


def test_too_little_memory_says_how_many_bytes_are_missing_and_what_would_fit() -> None:
    world = World(2, capacity=5 * SIZE)
    world.run()
    assert coverage(world) == pytest.approx(10 / 12)
    text = problem(world.pool)
    assert f"{2 * SIZE} bytes" in text
    assert "1 more worker" in text
    assert f"--worker-memory {7 * SIZE}" in text
    roomy = World(2, capacity=7 * SIZE)
    roomy.run()
    assert coverage(roomy) == 1


# ---------------------------------------------------------------- loss and return


def test_a_restarted_worker_gets_its_experts_back_and_nothing_else_moves() -> None:
    world = ready(3)
    before = {name: set(worker.held) for name, worker in world.workers.items()}
    world.kill("worker-1")
    assert word(world, "worker-1") == "LOST"
    assert "worker-1" not in {name for names in world.pool.placement.replicas.values() for name in names}
    world.workers["worker-1"].restart()
    world.run(3)
    assert {name: set(worker.held) for name, worker in world.workers.items()} == before
    assert world.pool.members["worker-1"].restarts == 1
    assert word(world, "worker-1") == "READY"


def test_one_failed_call_is_no_loss_and_a_slow_worker_gets_more_time() -> None:
    world = ready(2)
    world.pool.unreachable("worker-0", "refused", world.now)
    assert word(world, "worker-0") == "READY"
    world.describe("worker-0")
    for _ in range(TIMEOUTS_UNTIL_LOST - 1):
        world.pool.unreachable("worker-0", "late", world.now, timeout=True)
    assert word(world, "worker-0") == "READY"
    world.pool.unreachable("worker-0", "late", world.now, timeout=True)
    assert word(world, "worker-0") == "LOST"
    world.describe("worker-0")
    assert word(world, "worker-0") == "READY"
    assert world.replicas() == [2] * 12


def test_experts_without_a_live_worker_go_to_a_survivor_at_once() -> None:
    world = ready(2, redundancy=1)
    orphans = set(world.workers["worker-0"].held)
    world.kill("worker-0")
    world.step()
    assert {key for action in world.under_way if isinstance(action, Assign) for key in action.experts} == orphans


def test_a_worker_that_stays_away_is_replaced_after_the_grace_time() -> None:
    world = ready(3)
    world.kill("worker-2")
    world.run(int(GRACE_SECONDS) - 1)
    assert 1 in world.replicas()
    world.run(5)
    assert world.replicas() == [2] * 12


def test_a_worker_that_hangs_is_restarted_after_a_minute_and_again_only_after_more() -> None:
    world = ready(2)
    world.kill("worker-1")
    asked = []
    for _ in range(int(4 * HUNG_SECONDS)):
        world.now += 1
        world.step()
        asked += [world.now for action in world.under_way if action == Restart("worker-1")]
        world.under_way.clear()
    assert len(asked) == 2
    assert asked[0] - world.pool.members["worker-1"].since > HUNG_SECONDS
    assert asked[1] - asked[0] > 2 * HUNG_SECONDS
    world.run(int(4 * HUNG_SECONDS) + 1)
    assert word(world, "worker-1") == "READY"


def test_the_reason_why_a_worker_does_not_start_is_told() -> None:
    world = World(1)
    world.pool.unreachable("worker-0", "No trusted connection.", world.now)
    assert "worker-0: No trusted connection." in problem(world.pool)
    revision = world.pool.revision
    world.pool.unreachable("worker-0", "No trusted connection.", world.now)
    assert world.pool.revision == revision  # nobody is told twice
    world.run()
    assert problem(world.pool) == world.pool.members["worker-0"].detail == ""


def test_survivors_without_room_give_up_redundant_replicas_for_coverage() -> None:
    world = ready(3, capacity=8 * SIZE)
    world.kill("worker-0")
    world.kill("worker-1")
    world.run(3)
    assert coverage(world) == pytest.approx(8 / 12)
    assert f"{4 * SIZE} bytes" in problem(world.pool)
    world.workers["worker-0"].restart()
    world.run()
    assert coverage(world) == 1


def test_what_an_engine_had_loaded_is_taken_into_the_placement() -> None:
    world = ready(3, redundancy=1)
    world.kill("worker-0")
    lost = next(iter(world.workers["worker-0"].held))
    world.workers["worker-1"].held[lost] = digest(lost)
    world.describe("worker-1")
    assert world.pool.placement.replicas[lost] == ("worker-1",)
    assert "worker-1" in world.pool.target[lost]


def test_an_old_description_does_not_undo_what_was_loaded_since() -> None:
    world = World(1)
    worker = world.workers["worker-0"]
    old, asked_at = worker.describe(), world.pool.members["worker-0"].changes
    world.describe("worker-0")
    world.step()
    world.carry_out(world.under_way.pop())
    world.pool.described("worker-0", old, world.now, asked_at=asked_at)
    assert coverage(world) == 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"numerics_id": "avx512"}, "avx512"),
        ({"model_digest": b"other"}, "another checkpoint"),
        ({"protocol_version": 2}, "version 2"),
        ({"held": {(0, 0): b"other"}}, "other weights"),
    ],
)
def test_a_worker_that_differs_is_refused_and_service_goes_on(change: dict[str, object], expected: str) -> None:
    world = ready(2)
    world.add(world.pool.add(1, world.now))
    world.workers["worker-2"] = replace(world.workers["worker-2"], **change)  # type: ignore[arg-type]
    world.run()
    assert world.pool.members["worker-2"].reach is Reach.REFUSED
    assert expected in world.pool.members["worker-2"].detail
    assert world.replicas() == [2] * 12
    assert named_at(world, "worker-2") == frozenset()


def test_a_replica_with_another_digest_is_refused_when_it_is_loaded() -> None:
    world = ready(2)
    incarnation = world.workers["worker-0"].describe().incarnation
    world.pool.loaded("worker-0", incarnation, {(0, 0): b"other"}, world.now)
    world.describe("worker-0")
    assert word(world, "worker-0") == "REFUSED"
    world.workers["worker-0"].restart()
    world.run()
    assert word(world, "worker-0") == "READY"


def test_a_moved_replica_is_named_only_after_its_row_was_compared() -> None:
    world = ready(2)
    command = begin_scale(world.pool, 3, world.now)
    world.add(command.started)
    world.describe("worker-2")
    world.step()
    (assign,) = (action for action in world.under_way if isinstance(action, Assign))
    world.under_way.clear()
    world.carry_out(assign)
    assert named_at(world, "worker-2") == frozenset()
    world.step()
    probes = [action for action in world.under_way if isinstance(action, Probe)]
    assert {probe.expert for probe in probes} == set(assign.experts)
    world.pool.proved("worker-2", assign.incarnation, probes[0].expert, "", world.now)
    world.pool.publish_proven(world.now)
    assert named_at(world, "worker-2") == frozenset()
    world.pool.publish_proven(world.now + PROOFS_SECONDS)
    assert named_at(world, "worker-2") == {probes[0].expert}
    world.pool.proved("worker-2", assign.incarnation, probes[1].expert, "another row", world.now)
    world.describe("worker-2")
    assert word(world, "worker-2") == "REFUSED"
    assert world.replicas() == [2] * 12


# ---------------------------------------------------------------- engines


def test_a_replica_is_released_only_when_every_engine_uses_a_placement_without_it() -> None:
    world = ready(2, redundancy=1)
    world.says("a")
    world.says("b")
    begin_drain(world.pool, "worker-0", world.now)
    world.run(4)
    assert word(world, "worker-0") == "DRAINING"
    assert named_at(world, "worker-0") == frozenset()
    world.says("a")
    world.run(1)
    assert word(world, "worker-0") == "DRAINING"
    world.pool.engine_gone("b")
    world.run(1)
    assert word(world, "worker-0") == "DRAINED"


def test_an_engine_that_stays_silent_is_not_waited_for() -> None:
    world = ready(2, redundancy=1)
    old = world.pool.epoch
    begin_drain(world.pool, "worker-0", world.now)
    for _ in range(2 * int(SILENT_SECONDS)):  # it speaks, and has not moved on
        world.says("a", old)
        world.run(1)
    assert word(world, "worker-0") == "DRAINING"
    world.run(int(SILENT_SECONDS) - 1)
    assert word(world, "worker-0") == "DRAINING"
    world.run(3)
    assert word(world, "worker-0") == "DRAINED"


def test_a_replica_that_is_being_released_is_not_named_again() -> None:
    world = ready(2, redundancy=1)
    command = begin_drain(world.pool, "worker-0", world.now)
    while not any(isinstance(action, Release) for action in world.under_way):
        for action in world.under_way:
            world.carry_out(action)
        world.under_way.clear()
        world.step()
    world.kill("worker-1")
    assert coverage(world) == 0
    for action in world.under_way:
        world.carry_out(action)
    world.under_way.clear()
    world.workers["worker-1"].restart()
    world.finish(command)
    world.run()
    assert coverage(world) == 1


# ---------------------------------------------------------------- little memory


def test_an_expert_without_room_waits_for_another_to_move_out_which_does_not_wait_for_it() -> None:
    world = World(2, experts=2, capacity=2 * SIZE, redundancy=1)
    leaving, staying, there, uncovered = world.pool.target
    world.workers["worker-0"].held = {key: digest(key) for key in (leaving, staying)}
    world.workers["worker-1"].held = {there: digest(there)}
    for name in world.workers:
        world.describe(name)
    tend(world.pool, world.now)
    target = {leaving: ["worker-1"], staying: ["worker-0"], there: ["worker-1"], uncovered: ["worker-0"]}
    world.pool.set_target(target, world.now)
    world.run()
    assert coverage(world) == 1
    assert world.workers["worker-0"].held.keys() == {staying, uncovered}


def test_a_worker_that_needs_memory_gives_up_what_another_one_holds() -> None:
    world = ready(3, experts=2, capacity=3 * SIZE)
    first, second = world.pool.members["worker-0"], world.pool.members["worker-1"]
    shared = next(key for key in first.held if key in second.held)
    wanted = next(key for key in world.pool.target if key not in first.held)
    assert world.pool.free_bytes(first) < SIZE * len(world.pool.target)
    first.capacity_bytes = SIZE * len(first.held)
    target = dict(world.pool.target) | {
        shared: {"worker-1", "worker-9"},
        wanted: world.pool.target[wanted] | {"worker-0"},
    }
    world.pool.set_target(target, world.now)
    assert world.pool.placement.replicas[shared] == ("worker-1",)


# ---------------------------------------------------------------- commands


def test_a_drained_worker_stays_and_holds_nothing() -> None:
    world = ready(3)
    world.finish(begin_drain(world.pool, "worker-1", world.now))
    assert word(world, "worker-1") == "DRAINED"
    assert world.workers["worker-1"].held == {}
    assert world.replicas() == [2] * 12
    world.finish(begin_drain(world.pool, "worker-1", world.now))


def test_the_workers_of_a_node_are_drained_together_and_none_to_another_there() -> None:
    world = ready(4)
    for number in range(4):
        world.pool.located(f"worker-{number}", f"10.0.0.{number}:1", f"node-{number // 2}")
    world.run()
    moves = world.pool.moves
    world.finish(begin_drain_node(world.pool, "node-0", world.now))
    assert [word(world, f"worker-{number}") for number in range(4)] == ["DRAINED"] * 2 + ["READY"] * 2
    assert coverage(world) == 1
    held = 2 * 12 // 2  # of both workers, before
    assert world.pool.moves - moves <= 2 * held  # each replica is loaded once elsewhere and released once
    with pytest.raises(Refused, match="No worker is on the node 'node-9'"):
        begin_drain_node(world.pool, "node-9", world.now)


def test_a_drain_is_of_the_place_and_ends_when_the_worker_has_left_it() -> None:
    world = ready(3)
    world.pool.located("worker-1", "10.0.0.1:1", "node-1")
    world.finish(begin_drain(world.pool, "worker-1", world.now))
    world.kill("worker-1")
    world.workers["worker-1"].restart()
    world.pool.located("worker-1", "10.0.0.1:2", "node-1")
    world.run()
    assert word(world, "worker-1") == "DRAINED"  # the same node
    world.kill("worker-1")
    world.workers["worker-1"].restart()
    world.pool.located("worker-1", "10.0.0.2:1", "node-2")
    world.run(120)
    assert word(world, "worker-1") == "READY"
    world.finish(begin_drain(world.pool, "worker-0", world.now))  # there is room on it
    assert world.workers["worker-1"].held


def test_scale_starts_workers_and_stops_those_of_the_highest_numbers() -> None:
    world = ready(2)
    world.finish(begin_scale(world.pool, 4, world.now))
    assert [word(world, name) for name in sorted(world.workers)] == ["READY"] * 4
    assert world.workers["worker-3"].held
    world.finish(begin_scale(world.pool, 1, world.now))
    assert list(world.workers) == ["worker-0"]
    assert coverage(world) == 1


def test_rebalance_spreads_the_reported_load_and_a_dry_run_changes_nothing() -> None:
    world = ready(2, redundancy=1)
    hot = dict.fromkeys(list(named_at(world, "worker-0"))[:3], 1000)
    world.says("a", tokens=hot)
    target = dict(world.pool.target)
    plan, moves, command = begin_rebalance(world.pool, 0, world.now, dry_run=True)
    assert moves
    assert plan.imbalance_after < plan.imbalance_before
    assert command.is_over(world.now)
    assert world.pool.target == target
    world.pool.engine_gone("a")
    _, moves, command = begin_rebalance(world.pool, 0, world.now, dry_run=False)
    world.finish(command)
    assert all((move.layer, move.expert) in world.workers[move.destination].held for move in moves if move.destination)


def test_rebalance_by_eplb_is_asked_for_by_name_and_says_what_it_cannot_do() -> None:
    world = ready(2, redundancy=1)
    hot = dict.fromkeys(sorted(named_at(world, "worker-0"))[:3], 1000)
    world.says("a", tokens=hot)
    world.pool.engine_gone("a")
    plan, moves, command = begin_rebalance(world.pool, 0, world.now, dry_run=False, policy="eplb")
    assert moves
    assert plan.imbalance_after < plan.imbalance_before
    world.finish(command)
    assert coverage(world) == 1
    for changes, expected in (({"policy": "eplb"}, "move budget"), ({"policy": "best"}, "'best'")):
        with pytest.raises(Refused, match=expected):
            begin_rebalance(world.pool, 3, world.now, dry_run=True, **changes)


def test_commands_that_would_uncover_an_expert_are_refused_with_the_missing_bytes() -> None:
    world = ready(2, capacity=8 * SIZE)
    with pytest.raises(Refused, match=f"{4 * SIZE} bytes"):
        begin_drain(world.pool, "worker-0", world.now)
    with pytest.raises(Refused, match=f"{4 * SIZE} bytes"):
        begin_scale(world.pool, 1, world.now)
    with pytest.raises(Refused, match="1 or more"):
        begin_scale(world.pool, 0, world.now)
    assert [word(world, name) for name in world.workers] == ["READY"] * 2


def test_an_unknown_worker_is_named_with_those_that_there_are() -> None:
    world = ready(2)
    with pytest.raises(Refused, match="worker-0, worker-1") as caught:
        begin_drain(world.pool, "worker-7", world.now)
    assert caught.value.unknown


def test_nothing_is_moved_while_coverage_is_incomplete() -> None:
    world = World(2, capacity=5 * SIZE)
    world.run()
    for begin in (
        lambda: begin_drain(world.pool, "worker-0", world.now),
        lambda: begin_scale(world.pool, 1, world.now),
        lambda: begin_rebalance(world.pool, 0, world.now, dry_run=False),
    ):
        with pytest.raises(Refused, match="2 of 12 experts"):
            begin()
    world.finish(begin_scale(world.pool, 3, world.now))
    assert coverage(world) == 1


def test_a_command_without_progress_ends_and_leaves_the_pool_as_it_is() -> None:
    world = ready(2)
    command = begin_scale(world.pool, 3, world.now)  # nobody starts it
    for _ in range(int(STALL_SECONDS)):
        assert not command.is_over(world.now)
        world.run(1)
    world.now += STALL_SECONDS
    with pytest.raises(Refused, match="did not come to an end"):
        command.is_over(world.now)
    assert coverage(world) == 1


# ---------------------------------------------------------------- another controller


def test_a_new_controller_stands_above_what_the_workers_were_told() -> None:
    world = ready(2)
    old_term = world.pool.term
    told = max(worker.epoch for worker in world.workers.values())
    world.succeed()
    assert world.pool.recovering
    world.describe("worker-0")
    world.step()
    assert world.pool.recovering
    world.describe("worker-1")
    world.step()
    assert not world.pool.recovering
    assert world.pool.term > old_term
    assert world.pool.epoch > told
    assert coverage(world) == 1
    assert world.under_way == []


@pytest.mark.parametrize("early", [False, True])
def test_epochs_go_on_from_what_an_engine_uses_although_no_worker_was_told_of_it(early: bool) -> None:
    world = ready(2, redundancy=1)
    for _ in range(3):  # placements without a word to the workers
        world.kill("worker-0")
        world.workers["worker-0"].alive = True
        world.describe("worker-0")
    used = world.pool.term, world.pool.epoch
    assert used[1] > 1 + max(worker.epoch for worker in world.workers.values())
    world.succeed()
    if early:
        world.pool.engine_said("a", *used, {}, world.now)
    world.run(1)
    world.pool.engine_said("a", *used, {}, world.now)
    assert world.pool.term > used[0]
    assert world.pool.epoch > used[1]
    assert pool_state(world.pool).epoch == world.pool.epoch


def test_a_controller_that_knows_of_no_earlier_one_learns_of_it_from_an_engine() -> None:
    world = ready(2)
    world.says("b")
    used = world.pool.epoch + 25
    world.pool.engine_said("a", world.pool.term, used, {}, world.now)
    assert world.pool.term == 2
    assert {engine.acknowledged for engine in world.pool.engines.values()} == {0}
    assert world.pool.epoch == used + 1


def test_what_an_engine_acknowledged_to_an_earlier_controller_releases_nothing() -> None:
    world = ready(2, redundancy=1)
    used = world.pool.term, world.pool.epoch
    world.succeed()
    begun = False
    for _ in range(2 * int(RETURN_SECONDS)):
        world.pool.engine_said("a", used[0], used[1] + 100, {}, world.now)
        world.run(1)
        if not begun:
            begin_drain(world.pool, "worker-0", world.now)
            begun = True
    assert word(world, "worker-0") == "DRAINING"
    world.says("a")
    world.run(1)
    assert word(world, "worker-0") == "DRAINED"


def test_a_new_controller_lets_engines_come_back_before_it_releases() -> None:
    world = ready(2, redundancy=1)
    world.succeed()
    world.run(1)
    begin_drain(world.pool, "worker-0", world.now)
    world.run(int(RETURN_SECONDS) - 2)
    assert word(world, "worker-0") == "DRAINING"
    world.run(2)
    assert word(world, "worker-0") == "DRAINED"


def test_the_lease_ends_only_without_keeper_and_engines() -> None:
    lease = Lease(0.0)
    assert not lease.is_over(LEASE_SECONDS, engines=0)
    assert not lease.is_over(LEASE_SECONDS + 1, engines=1)
    assert not lease.is_over(2 * LEASE_SECONDS, engines=0)
    assert lease.is_over(2 * LEASE_SECONDS + 2, engines=0)
    lease.renew(100.0)
    assert not lease.is_over(101.0, engines=0)


def test_what_is_loaded_after_its_worker_began_to_drain_is_released_too() -> None:
    world = ready(2)
    world.add(begin_scale(world.pool, 3, world.now).started)
    world.describe("worker-2")
    world.step()
    (assign,) = (action for action in world.under_way if isinstance(action, Assign))
    world.under_way.clear()
    begin_drain(world.pool, "worker-2", world.now)
    world.carry_out(assign)
    assert word(world, "worker-2") == "DRAINING"
    world.run(3)
    assert word(world, "worker-2") == "DRAINED"


# ---------------------------------------------------------------- hardware


def fails(world: World, name: str, verdict: Verdict = BROKEN) -> None:
    world.workers[name].verdict = verdict
    world.describe(name)


def test_a_worker_whose_hardware_fails_is_drained_then_moved_and_gets_experts_again() -> None:
    world = ready(3)
    fails(world, "worker-1")
    world.step()
    assert word(world, "worker-1") == "DRAINING"
    world.run()
    assert world.replaced == [Move("worker-1")]
    assert [word(world, name) for name in world.workers] == ["READY"] * 3
    assert world.replicas() == [2] * 12


def test_nothing_is_uncovered_while_failing_hardware_is_left() -> None:
    world = ready(2, redundancy=1)
    fails(world, "worker-0")
    while not world.replaced:
        world.run(1)
        assert coverage(world) == 1
    assert named_at(world, "worker-0") == set()


def test_a_worker_that_fails_is_not_drained_where_that_would_uncover_experts_and_the_reason_is_told() -> None:
    world = ready(2, capacity=6 * SIZE, redundancy=1)
    fails(world, "worker-0")
    world.run()
    assert coverage(world) == 1
    assert world.replaced == []
    detail = pool_state(world.pool).workers[0].detail
    assert "XID 79" in detail
    assert f"{6 * SIZE} bytes" in detail
    world.finish(begin_scale(world.pool, 3, world.now))
    world.now += RETRY_SECONDS
    world.run()
    assert world.replaced == [Move("worker-0")]


def test_a_drain_that_was_refused_is_tried_again_after_a_while_and_its_reason_is_then_gone() -> None:
    world = ready(2, capacity=6 * SIZE, redundancy=1)
    fails(world, "worker-0")
    world.step()
    world.pool.members["worker-1"].capacity_bytes = 12 * SIZE
    world.now += RETRY_SECONDS / 2
    world.step()
    assert word(world, "worker-0") == "READY"
    world.now += RETRY_SECONDS / 2
    world.step()
    assert word(world, "worker-0") == "DRAINING"
    assert pool_state(world.pool).workers[0].detail == BROKEN.reason


def test_hardware_that_fails_again_is_left_less_and_less_often() -> None:
    world = ready(2)
    moved = []
    fails(world, "worker-0")
    for _ in range(int(7 * HUNG_SECONDS)):
        world.run(1)
        if world.replaced:
            moved.append(world.now)
            world.replaced.clear()
            world.workers["worker-0"].verdict = BROKEN  # the new process finds it broken too, before anybody asks
    assert len(moved) == 3
    assert moved[1] - moved[0] > 2 * HUNG_SECONDS
    assert moved[2] - moved[1] > 4 * HUNG_SECONDS
    assert coverage(world) == 1


def test_a_worker_that_is_about_to_be_moved_is_not_used_though_it_came_back_well() -> None:
    world = ready(3)
    fails(world, "worker-1")
    while not world.under_way or not isinstance(world.under_way[-1], Move):
        world.describe("worker-1")
        world.step()
        for action in [action for action in world.under_way if not isinstance(action, Move)]:
            world.under_way.remove(action)
            world.carry_out(action)
    world.workers["worker-1"].restart()
    world.describe("worker-1")
    assert word(world, "worker-1") == "DRAINED"
    world.run()
    assert word(world, "worker-1") == "READY"


def test_a_new_worker_on_failing_hardware_gets_no_expert() -> None:
    world = ready(2)
    world.add(world.pool.add(1, world.now))
    world.workers["worker-2"].verdict = BROKEN
    world.describe("worker-2")
    world.step()
    assert word(world, "worker-2") == "DRAINED"
    assert not any(isinstance(action, Assign) for action in world.under_way)


def test_failing_hardware_is_left_out_of_the_first_plan() -> None:
    world = World(2)
    world.workers["worker-0"].verdict = BROKEN
    for name in world.workers:
        world.describe(name)
    world.step()
    world.run(2)
    assert coverage(world) == 1
    assert named_at(world, "worker-1") == set(world.pool.target)


def test_what_an_operator_drains_is_neither_moved_nor_used_again() -> None:
    world = ready(3)
    world.finish(begin_drain(world.pool, "worker-1", world.now))
    fails(world, "worker-1")
    world.run()
    assert world.replaced == []
    world.workers["worker-1"].restart()
    world.run()
    assert word(world, "worker-1") == "DRAINED"


def test_an_operator_may_take_over_a_drain_for_failing_hardware() -> None:
    world = ready(3)
    fails(world, "worker-1")
    world.step()
    world.finish(begin_drain(world.pool, "worker-1", world.now))
    world.run()
    assert world.replaced == []
    assert word(world, "worker-1") == "DRAINED"


def test_a_drain_that_an_operator_is_refused_takes_nothing_over() -> None:
    world = ready(2, redundancy=1)
    fails(world, "worker-0")
    world.step()
    for name in world.workers:
        world.pool.located(name, name, "node")
    with pytest.raises(Refused):
        begin_drain_node(world.pool, "node", world.now)
    world.run()
    assert world.replaced == [Move("worker-0")]


def test_a_slowed_worker_keeps_its_experts_and_its_weight_is_told_at_once() -> None:
    world = ready(2)
    before, revision = world.pool.placement, world.pool.revision
    fails(world, "worker-0", HOT)
    world.run()
    assert world.pool.placement == before
    assert world.pool.revision > revision
    assert pool_state(world.pool).workers[0].health.weight == 0.5
    assert pool_state(world.pool).workers[0].detail == "GPU 0: hot."


def test_readings_wake_nobody_and_are_told_to_whoever_asks() -> None:
    world = ready(1, redundancy=1)
    description = replace(world.workers["worker-0"].describe(), gpus=(experts_pb2.Gpu(temperature_celsius=50),))
    revision, readings = world.pool.revision, world.pool.readings
    world.pool.described("worker-0", description, world.now)
    world.pool.described("worker-0", description, world.now)
    assert (world.pool.revision, world.pool.readings) == (revision, readings + 1)
    assert pool_state(world.pool).workers[0].health.gpus[0].temperature_celsius == 50


# ---------------------------------------------------------------- the wire


def test_messages_carry_the_pool() -> None:
    world = ready(2)
    world.pool.located("worker-0", "127.0.0.1:1", "node")
    state = pool_state(world.pool)
    assert (state.coverage, state.experts_uncovered, state.epoch) == (1.0, 0, world.pool.epoch)
    assert [(layer.layer, len(layer.experts)) for layer in state.layers] == [(0, 6), (3, 6)]
    assert state.layers[0].experts[2].digest == digest((0, 2))
    assert list(state.layers[0].experts[2].workers) == ["worker-0", "worker-1"]
    assert (state.workers[0].address, state.workers[0].held_bytes) == ("127.0.0.1:1", 12 * SIZE)
    assert [(m.layer, list(m.experts)) for m in by_layer([(3, 1), (0, 5), (0, 2)])] == [(0, [2, 5]), (3, [1])]
    assert len(probe_row(64, "float32")) == 256
    assert len(probe_row(64, "bfloat16")) == 128


# ---------------------------------------------------------------- laws


@settings(max_examples=100, deadline=None)
@example(seed=3, workers=2, redundancy=1, room=6)  # a replica whose reference went before they were compared
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 4), redundancy=st.integers(1, 3), room=st.integers(3, 14))
def test_whatever_happens_nothing_is_uncovered_but_by_a_loss_and_all_comes_to_rest(
    seed: int, workers: int, redundancy: int, room: int
) -> None:
    draw = random.Random(seed)
    world = World(workers, experts=3, capacity=room * SIZE, redundancy=redundancy)
    commands: list[Command] = []
    for _ in range(60):
        before, epoch = world.pool.placement, world.pool.epoch
        loss = _something_happens(world, draw, commands)
        after = world.pool.placement
        if after is not before:
            assert after.epoch > epoch
            if not loss:
                assert set(after.uncovered()) <= set(before.uncovered())
        for key, names in after.replicas.items():
            assert all(world.pool.members[name].live and key in world.pool.members[name].held for name in names)
    for worker in world.workers.values():
        if not worker.alive or worker.verdict == BROKEN:
            worker.restart()
    for command in commands:
        for _ in range(200):
            try:
                if command.is_over(world.now):
                    break
            except Refused:
                break
            world.run(1)
        else:
            raise AssertionError("a command does not end")
    world.pool.engines.clear()
    world.run()
    able = [m.capacity_bytes for m in world.pool.members.values() if m.live and not m.draining]
    if sum(able) >= 6 * SIZE:
        assert coverage(world) == 1
    assert is_settled(world.pool) or sum(able) < redundancy * 6 * SIZE


def _something_happens(world: World, draw: random.Random, commands: list[Command]) -> bool:
    """One random event; True if it may take replicas away."""
    world.now += draw.choice([0.0, 0.1, 0.5, 4.0])
    names = list(world.workers)
    name = draw.choice(names)
    match draw.randrange(11):
        case 0:
            world.workers[name].alive = False
        case 1 if not world.workers[name].alive:
            world.workers[name].restart()
        case 2:
            world.says(draw.choice("ab"), draw.choice([0, world.pool.epoch]))
        case 3:
            world.pool.engine_gone(draw.choice("ab"))
        case 4 if draw.random() < 0.3:
            try:
                if draw.random() < 0.5:
                    commands.append(begin_drain(world.pool, name, world.now))
                else:
                    commands.append(begin_scale(world.pool, draw.randint(1, 4), world.now))
                    world.add(commands[-1].started)
            except Refused:
                return False
        case 5 if world.workers[name].verdict != BROKEN:  # which stays for as long as its process
            world.workers[name].verdict = draw.choice([HEALTHY, HOT, BROKEN])
        case 6 | 7 if world.under_way:
            action = world.under_way.pop(draw.randrange(len(world.under_way)))
            if isinstance(action, Release):
                _assert_unused(world, action)
            world.carry_out(action)
            return False
        case 8 | 9:
            worker, member = world.workers[name], world.pool.members[name]
            loss = not worker.alive or worker.describe().incarnation != member.incarnation
            world.describe(name)
            return loss
        case _:
            world.step()
    return False


def _assert_unused(world: World, release: Release) -> None:
    """No expert that is named at a worker is being released there, if that is still the process that was asked."""
    member = world.pool.members.get(release.worker)
    if member is not None and member.incarnation == release.incarnation:
        assert not set(release.experts) & named_at(world, release.worker)
