"""Workers between nodes as they are started: `python -m experts.worker.dist` on a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from barista.errors import ConfigError
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.expert_model import ExpertModel
from experts.expert_weights import ExpertReader
from experts.pool import DispatchBatch
from experts.transport.dist import DistTransport
from experts.transport.dist_model import deal
from experts.transport.dist_rendezvous import Rendezvous
from experts.transport.local import LocalTransport
from tests.distributed.workers import tiny_expert_model

ROOT = Path(__file__).parents[2]
NAMES = ("w0", "w1")
SOON = 60.0  # seconds within which what must happen has happened on any machine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or kernels.numerics_id() == "torch-reference",
    reason="the interface is named as on Linux, and without a compiler bytes depend on the batch",
)


@pytest.fixture(scope="module", autouse=True)
def loopback():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ExpertModel:
    return tiny_expert_model(tmp_path_factory.mktemp("tiny") / "model", "bfloat16")


@contextmanager
def workers(model: ExpertModel, folder: Path, *names: str, capacity: int = 1 << 30):
    """A rendezvous with these workers on their way to it. At the end they have ended, told so or not."""
    (folder / "model.json").write_text(model.to_json())
    rendezvous = Rendezvous()
    command = [sys.executable, "-m", "experts.worker.dist", "--engine", rendezvous.address]
    command += ["--model", str(folder / "model.json"), "--capacity", str(capacity), "--name"]
    processes = [subprocess.Popen([*command, name], cwd=ROOT) for name in names]
    try:
        yield rendezvous, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def local(model: ExpertModel) -> LocalTransport:
    dtype = getattr(torch, model.dtype)
    reader = ExpertReader(open_checkpoint(model.path), dtype)
    return LocalTransport(
        {
            layer: kernels.ExpertTable(
                {expert: reader.read(spec, layer, expert) for expert in range(spec.num_experts)}, spec.num_experts
            )
            for layer, spec in model.layers.items()
        }
    )


def batch(layer: int, seed: int) -> DispatchBatch:
    """Of tests/unit/tiny_model.py: 4 experts, top 2, hidden 32."""
    generator = torch.Generator().manual_seed(seed)
    topk_ids = torch.rand(6, 4, generator=generator).argsort(1)[:, :2].int().contiguous()
    hidden_states = torch.randn(6, 32, generator=generator).bfloat16()
    return DispatchBatch(1, layer, hidden_states, topk_ids, torch.rand(6, 2, generator=generator))


def assert_same_bytes(transport: DistTransport, expected: LocalTransport) -> None:
    for layer in (0, 1):
        rows, failed = transport.combine(transport.dispatch(batch(layer, seed=layer)))
        assert not failed.any()
        assert torch.equal(rows, expected.combine(batch(layer, seed=layer))[0])


def test_a_checkpoint_is_served_in_group_after_group_until_the_engine_says_stop(model, tmp_path):
    with workers(model, tmp_path, *NAMES) as (rendezvous, processes):
        with pytest.raises(ConfigError, match=r"Worker w0 cannot join.*digest is"):
            rendezvous.form(deal(replace(model, digest=b"another"), rendezvous.gather(2, SOON)), SOON)
        assert rendezvous.gather(2, SOON) == NAMES
        both = deal(model, NAMES)
        transport = DistTransport(rendezvous.form(both, SOON), both)
        assert_same_bytes(transport, local(model))
        transport.leave()
        assert rendezvous.gather(2, SOON) == NAMES
        other_way_round = deal(model, NAMES[::-1])
        transport.restart(rendezvous.form(other_way_round, SOON), other_way_round)
        assert_same_bytes(transport, local(model))
        transport.stop()
        assert [process.wait(SOON) for process in processes] == [0, 0]


def test_a_worker_without_room_for_its_share_says_so(model, tmp_path):
    with workers(model, tmp_path, "w0", capacity=1) as (rendezvous, processes):
        with pytest.raises(ConfigError, match=r"Worker w0 cannot join.*bytes of experts do not fit"):
            rendezvous.form(deal(model, rendezvous.gather(1, SOON)), SOON)
        rendezvous.close()
        assert processes[0].wait(SOON) == 0
