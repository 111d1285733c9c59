"""Real worker processes of tiny models, for tests. Each is gone at the end of its `with`, whatever happens there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from barista.cache import cache_root
from barista.trust import TOKEN_VARIABLE, Trust
from experts import kernels
from experts.checkpoint import checkpoint_digest, open_checkpoint
from experts.expert_model import ExpertModel
from experts.formats import PLAIN
from router.model.families import model_spec
from router.model.spec import MoESpec
from tests.unit.tiny_model import write_tiny_model

TOKEN = "test-token"
TRUST = Trust(TOKEN)
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RunningWorker:
    process: subprocess.Popen[bytes]
    address: str
    pid: int
    name: str

    def end(self) -> None:
        """Let it end in order, and wait until it has gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def kill(self) -> None:
        """SIGKILL, and wait until it has gone."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP for the length of the `with`, once it has really stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


def expert_model(path: Path, dtype: str = "float32", weight_format: str = PLAIN) -> ExpertModel:
    checkpoint = open_checkpoint(path)
    spec = model_spec(checkpoint.config)
    layers = {index: layer for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)}
    return ExpertModel(
        path=path,
        dtype=dtype,
        top_k=max(layer.gate.top_k for layer in layers.values()),
        layers={index: layer.experts for index, layer in layers.items()},
        digest=checkpoint_digest(checkpoint, dtype, weight_format),
        format=weight_format,
    )


def tiny_expert_model(
    folder: Path, dtype: str = "float32", weight_format: str = PLAIN, **changes: object
) -> ExpertModel:
    """The experts of tests/unit/tiny_model.py: two layers of 4 experts, top 2, hidden 32, intermediate 16."""
    return expert_model(write_tiny_model(folder, **changes), dtype, weight_format)


@contextmanager
def start_worker(
    model: ExpertModel,
    name: str,
    *,
    capacity: int = 1 << 30,
    threads: int = 1,
    env: Mapping[str, str] | None = None,
    main: str = "experts.worker",
    tls_dir: Path | None = None,
) -> Iterator[RunningWorker]:
    """A worker process that holds nothing yet. main: a module with the same flags, such as one that misbehaves."""
    with start_workers(model, name, capacity=capacity, threads=threads, env=env, main=main, tls_dir=tls_dir) as workers:
        yield workers[0]


@contextmanager
def start_workers(
    model: ExpertModel,
    *names: str,
    capacity: int = 1 << 30,
    threads: int = 1,
    env: Mapping[str, str] | None = None,
    main: str = "experts.worker",
    tls_dir: Path | None = None,
    flags: Sequence[str] = (),
) -> Iterator[list[RunningWorker]]:
    """Several, started side by side: most of their start is importing torch. flags: more of the worker's own."""
    kernels.load()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "model.json").write_text(model.to_json())
        (folder / "kernels").symlink_to(cache_root() / "kernels")  # a cache of their own, but for what is compiled
        command = [sys.executable, "-m", main, "--model", str(folder / "model.json"), "--until-eof"]
        command += ["--capacity", str(capacity), "--threads", str(threads)]
        command += [] if tls_dir is None else ["--tls-dir", str(tls_dir)]
        command += flags
        own = {TOKEN_VARIABLE: TOKEN, "BARISTA_CACHE": str(folder), "PYTHONPATH": str(ROOT)}
        processes = [
            stack.enter_context(_process([*command, "--name", name], os.environ | own | dict(env or {})))
            for name in names
        ]
        yield [_serving(process, name) for process, name in zip(processes, names, strict=True)]


@contextmanager
def _process(command: list[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    try:
        yield process
    finally:
        process.kill()  # also ends a stopped one
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _serving(process: subprocess.Popen[bytes], name: str) -> RunningWorker:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"{name} ended with exit code {process.wait()}"
    served = json.loads(line)
    return RunningWorker(process, served["address"], served["pid"], served["name"])
