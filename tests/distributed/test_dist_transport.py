"""Rows over torch.distributed: real processes and gloo on loopback. The bytes of `local`; deaths, hangs, new groups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barista.errors import BaristaError, ConfigError
from experts import kernels
from experts.numerics import numerics_id
from experts.pool import DispatchBatch, ExpertPool
from experts.transport.dist import DistTransport, compute
from experts.transport.dist_agreement import Agreement
from experts.transport.dist_group import Group, GroupBroken
from experts.transport.dist_rendezvous import Rendezvous, run_worker
from experts.transport.local import LocalTransport
from tests.distributed import dist_worker
from tests.distributed.dist_worker import DIGEST, HIDDEN, LAYER_THAT_RAISES, LAYERS, NUM_EXPERTS

ROOT = Path(__file__).parents[2]
NAMES = ("w0", "w1", "w2")
SOON = 60.0  # seconds within which what must happen has happened on any machine
HANG = 2.0  # seconds after which a rank that hangs is lost

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or kernels.numerics_id() == "torch-reference",
    reason="the interface is named as on Linux, and without a compiler bytes depend on the batch",
)


class Crew:
    """A rendezvous and its workers, which serve in one group after another. One that has ended is started again."""

    def __init__(self) -> None:
        self.rendezvous = Rendezvous()
        self.processes: dict[str, subprocess.Popen] = {}

    def gather(self) -> None:
        """Every worker waits for the next group."""
        for name in NAMES:
            if name not in self.processes or self.processes[name].poll() is not None:
                command = [sys.executable, "-m", "tests.distributed.dist_worker", self.rendezvous.address, name]
                self.processes[name] = subprocess.Popen(command, cwd=ROOT)
        assert self.rendezvous.gather(len(NAMES), SOON) == NAMES

    @contextmanager
    def group(self, agreement: Agreement):
        """The engine's transport over a new group."""
        self.gather()
        transport = DistTransport(self.rendezvous.form(agreement, SOON), agreement)
        try:
            yield transport
        finally:
            transport.leave()

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    @contextmanager
    def stopped(self, name: str):
        """SIGSTOP for the length of the `with`, once it has really stopped."""
        process = self.processes[name]
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module", autouse=True)
def loopback():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


@pytest.fixture(scope="module")
def crew(loopback):
    crew = Crew()
    try:
        crew.gather()
        yield crew
        crew.rendezvous.close()
        assert [process.wait(SOON) for process in crew.processes.values()] == [0] * len(NAMES)
    finally:
        for name in crew.processes:
            crew.kill(name)


def agreement(num_workers: int = 3, way: str = "all_to_all", dtype: str = "float32", **changes) -> Agreement:
    """Experts dealt out to workers in turn: 7 to 3 of them."""
    ranks = tuple(1 + expert % num_workers for expert in range(NUM_EXPERTS))
    values = {
        "members": NAMES[:num_workers],
        "hidden_size": HIDDEN,
        "dtype": dtype,
        "owners": dict.fromkeys(LAYERS, ranks),
        "numerics_id": numerics_id(getattr(torch, dtype)),
        "digest": DIGEST,
        "way": way,
        "timeout": SOON,
    }
    return Agreement(**values | changes)


def batch(num_tokens: int, top_k: int, seed: int, dtype: str = "float32", layer: int = 3) -> DispatchBatch:
    """Distinct experts for each token, some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)
    topk_ids = order[:, :top_k].int().contiguous()
    topk_ids[torch.rand(num_tokens, top_k, generator=generator) < 0.1] = -1
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator).to(getattr(torch, dtype))
    topk_weights = torch.rand(num_tokens, top_k, generator=generator)
    return DispatchBatch(seed, layer, hidden_states, topk_ids, topk_weights)


def to_experts(*experts: int, num_tokens: int = 5) -> DispatchBatch:
    """Every token to the same experts."""
    ids = torch.tensor([experts] * num_tokens, dtype=torch.int32)
    base = batch(num_tokens, 1, seed=1)
    return DispatchBatch(1, 3, base.hidden_states, ids, torch.rand(ids.shape, generator=torch.Generator()))


def through(transport, batch: DispatchBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return transport.combine(transport.dispatch(batch))


def local(batch: DispatchBatch) -> tuple[torch.Tensor, torch.Tensor]:
    table = dist_worker.table(batch.layer, tuple(range(NUM_EXPERTS)), batch.hidden_states.dtype)
    return through(LocalTransport({batch.layer: table}), batch)


def assert_same_bytes(transport: DistTransport, batch: DispatchBatch) -> None:
    rows, failed = through(transport, batch)
    expected, _ = local(batch)
    assert not failed.any()
    assert rows.dtype is expected.dtype
    assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))


def assert_all_failed(batch: DispatchBatch, answer: tuple[torch.Tensor, torch.Tensor]) -> None:
    rows, failed = answer
    assert failed.shape == (len(batch.hidden_states),)
    assert failed.all()
    assert torch.equal(rows, torch.zeros_like(batch.hidden_states))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_all_to_all_gives_the_bytes_of_local(crew, num_workers, dtype):
    with crew.group(agreement(num_workers, dtype=dtype)) as transport:

        @settings(max_examples=25, deadline=None)
        @given(st.integers(0, 9), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from((1, 3)))
        def law(num_tokens, top_k, seed, layer):
            assert_same_bytes(transport, batch(num_tokens, top_k, seed, dtype, layer))

        law()
        assert transport.exact


@pytest.mark.parametrize("way", ["all_to_all", "all_gather"])
def test_rows_that_meet_few_ranks_come_back(crew, way):
    """All tokens to one expert, to the experts of one rank, and to none."""
    with crew.group(agreement(way=way)) as transport:
        for chosen in ((4,), (0, 3, 6), (-1, -1)):
            rows, failed = through(transport, to_experts(*chosen))
            assert not failed.any()
            torch.testing.assert_close(rows, local(to_experts(*chosen))[0])


def test_a_rank_may_hold_no_expert(crew):
    owners = dict.fromkeys(LAYERS, (3,) * NUM_EXPERTS)
    with crew.group(agreement(owners=owners)) as transport:
        assert_same_bytes(transport, batch(6, 3, seed=2))


def test_rows_of_a_view_are_read_in_place(crew):
    given = batch(6, 3, seed=3)
    wide = torch.cat([given.hidden_states] * 3, dim=1)
    view = DispatchBatch(1, 3, wide[:, HIDDEN : 2 * HIDDEN], given.topk_ids, given.topk_weights)
    with crew.group(agreement()) as transport:
        assert torch.equal(through(transport, view)[0], local(given)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_gather_gives_the_rows_of_local_up_to_rounding_and_says_so(crew, dtype):
    with crew.group(agreement(way="all_gather", dtype=dtype)) as transport:
        assert not transport.exact
        for seed in range(20):
            given = batch(seed % 7, 1 + seed % 5, seed, dtype)
            rows, failed = through(transport, given)
            assert not failed.any()
            torch.testing.assert_close(rows, local(given)[0])


def test_the_pool_reaches_its_experts_over_a_group(crew):
    given = batch(4, 2, seed=4)
    with crew.group(agreement()) as transport:
        pool = ExpertPool(transport, 1 + max(LAYERS), NUM_EXPERTS)
        rows, _ = pool.begin(1, 3, given.hidden_states, given.topk_ids, given.topk_weights).wait()
        assert torch.equal(rows, local(given)[0])


@pytest.mark.parametrize("way", ["all_to_all", "all_gather"])
def test_what_a_worker_cannot_compute_fails_its_tokens_and_nothing_else(crew, way):
    with crew.group(agreement(way=way)) as transport:
        lost = batch(4, 2, seed=5, layer=LAYER_THAT_RAISES)
        lost.topk_ids[0] = -1
        rows, failed = through(transport, lost)
        assert failed.tolist() == [False, *(lost.topk_ids[1:] >= 0).any(1).tolist()]
        assert (rows == 0).all()
        assert transport.broken is None
        assert not through(transport, batch(4, 2, seed=6))[1].any()


@pytest.mark.parametrize("way", ["all_to_all", "all_gather"])
def test_a_worker_killed_in_a_layer_fails_it_and_all_later_ones_until_a_new_group(crew, way):
    with crew.group(agreement(way=way)) as transport:
        under_way, later = batch(5, 4, seed=7), batch(5, 4, seed=8)
        through(transport, later)
        with crew.stopped("w1"):
            ticket = transport.dispatch(under_way)
            crew.kill("w1")
        assert_all_failed(under_way, transport.combine(ticket))
        reason = transport.broken
        assert "step 7, layer 3" in reason
        assert "Timed out" not in reason
        assert_all_failed(later, through(transport, later))
        assert transport.broken == reason

        assert crew.rendezvous.gather(2, SOON) == ("w0", "w2")
        survivors = agreement(2, members=("w0", "w2"))
        transport.restart(crew.rendezvous.form(survivors, SOON), survivors)
        assert_same_bytes(transport, later)
        assert_all_failed(under_way, transport.combine(ticket))
        assert transport.broken is None


def test_the_lost_worker_is_named_once(crew, caplog):
    with crew.group(agreement()) as transport:
        crew.kill("w2")
        for seed in (9, 10):
            through(transport, batch(5, 4, seed))
        assert "w2 is lost" in transport.broken
        assert caplog.text.count("w2 is lost") == 1


@pytest.mark.parametrize("way", ["all_to_all", "all_gather"])
def test_a_worker_that_hangs_is_lost_after_the_timeout_and_may_come_back(crew, way):
    with crew.group(agreement(way=way, timeout=HANG)) as transport:
        given = batch(5, 4, seed=11)
        with crew.stopped("w1"):
            assert_all_failed(given, through(transport, given))
            assert transport.broken is not None
            assert crew.rendezvous.gather(2, SOON) == ("w0", "w2")
        crew.gather()
        again = agreement()
        transport.restart(crew.rendezvous.form(again, SOON), again)
        assert_same_bytes(transport, given)


ENGINE = """
import time
from experts.transport.dist_rendezvous import Rendezvous
from tests.distributed.test_dist_transport import SOON, agreement
rendezvous = Rendezvous()
print(rendezvous.address, flush=True)
rendezvous.gather(1, SOON)
group = rendezvous.form(agreement(1), SOON)
print("formed", flush=True)
time.sleep(SOON)
"""


def test_a_worker_ends_when_its_engine_dies():
    with subprocess.Popen([sys.executable, "-c", ENGINE], cwd=ROOT, stdout=subprocess.PIPE, text=True) as engine:
        command = [sys.executable, "-m", "tests.distributed.dist_worker", engine.stdout.readline().strip(), "w0"]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as worker:
            try:
                assert engine.stdout.readline() == "formed\n"
                engine.kill()
                assert "cannot be reached" in worker.communicate(timeout=SOON)[1]
                assert worker.returncode == 1
            finally:
                engine.kill()
                worker.kill()


def test_stop_ends_the_workers_of_a_group(crew):
    with crew.group(agreement(1)) as transport:
        transport.stop()
        assert crew.processes["w0"].wait(SOON) == 0
        assert crew.processes["w1"].poll() is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"topk_ids": torch.tensor([[0, 7]], dtype=torch.int32)}, "Expert 7 of layer 3.*0 to 6"),
        ({"topk_ids": torch.tensor([[-2, 0]], dtype=torch.int32)}, "Expert -2 of layer 3"),
        ({"layer": 2}, r"Layer 2 has no experts.*\[1, 3, 9\]"),
        ({"hidden_states": torch.zeros(1, HIDDEN + 1)}, "41 float32 values.*40 of float32"),
        ({"hidden_states": torch.zeros(1, HIDDEN, dtype=torch.bfloat16)}, "40 bfloat16 values.*40 of float32"),
        ({"hidden_states": torch.zeros(2, HIDDEN)}, r"\(2, 40\), \(1, 2\), \(1, 2\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_sent(crew, wrong, message):
    fits = {
        "layer": 3,
        "hidden_states": torch.zeros(1, HIDDEN),
        "topk_ids": torch.tensor([[0, 1]], dtype=torch.int32),
        "topk_weights": torch.ones(1, 2),
    }
    with crew.group(agreement()) as transport:
        with pytest.raises(BaristaError, match=message):
            transport.dispatch(DispatchBatch(step=1, **fits | wrong))
        assert_same_bytes(transport, DispatchBatch(step=1, **fits))


def test_a_worker_of_another_model_is_refused_by_name_and_serves_in_the_next_group(crew):
    crew.gather()
    with pytest.raises(ConfigError, match=r"Worker w0 cannot join.*hidden_size is 40 here and 48 at the engine"):
        crew.rendezvous.form(agreement(hidden_size=48), SOON)
    with crew.group(agreement()) as transport:
        assert_same_bytes(transport, batch(3, 2, seed=12))


def test_a_member_that_has_not_come_is_named(crew):
    crew.gather()
    with pytest.raises(ConfigError, match=r"Worker nobody cannot join the group: it has said nothing for 0.1 s"):
        crew.rendezvous.form(agreement(2, members=("w0", "nobody")), within=0.1)


def test_a_member_that_is_lost_while_the_group_is_made_leaves_the_others_for_the_next_one(crew):
    crew.gather()
    host, port = crew.rendezvous.address.split(":")
    store = torch.distributed.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    store.set(f"group-{store.add('groups', 0)}/rank-2", "yes")  # a ghost says that it is ready, and is not there
    with pytest.raises(GroupBroken, match="could not be formed"):
        crew.rendezvous.form(agreement(2, members=("w0", "ghost"), timeout=HANG), SOON)
    with crew.group(agreement()) as transport:
        assert_same_bytes(transport, batch(3, 2, seed=13))


def test_a_group_that_was_left_has_no_hold_on_the_next_one(crew):
    crew.gather()
    before = crew.rendezvous.form(agreement(), SOON)
    before.leave()
    with crew.group(agreement()) as transport:
        before.leave()
        assert_same_bytes(transport, batch(3, 2, seed=14))


def test_an_address_that_cannot_be_had_is_named(crew):
    host, port = crew.rendezvous.address.split(":")
    with pytest.raises(ConfigError, match=f"Cannot listen on {host}:{port}"):
        Rendezvous(host, int(port))


def test_what_is_no_address_of_an_engine_is_refused():
    with pytest.raises(ConfigError, match="'node-0' is no HOST:PORT"):
        run_worker("node-0", "w0", dist_worker.load)


@pytest.mark.parametrize("answer", [torch.zeros(1, HIDDEN), torch.zeros(2, HIDDEN).bfloat16()])
def test_a_worker_sends_no_rows_of_another_shape_or_dtype(answer):
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    rows = compute(lambda layer, hidden_states, topk_ids: answer, 3, torch.zeros(1, HIDDEN), ids, 2)
    assert (rows.shape, rows.dtype) == ((2, HIDDEN), torch.float32)
    assert rows.isnan().all()


def test_a_process_is_in_one_group_at_a_time(crew):
    with crew.group(agreement(1)), pytest.raises(ConfigError, match=r"in a torch.distributed group already"):
        Group(torch.distributed.HashStore(), agreement(1), 0, torch.device("cpu"))
