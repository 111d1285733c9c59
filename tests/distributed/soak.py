"""Faults of every kind at random moments, on random placements over random wires, under a load that comes and goes."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from experts.attach import WorkerClient
from tests.distributed.engines_on_workers import MAX_NUM_SEQS, PATIENCE, HurtPool, Load, Served, engine_on_pool, serve
from tests.distributed.proxy import ChaosProxy, proxy_to
from tests.distributed.workers import TRUST

WIRES = ("shm", "grpc", "mixed")


class Chaos:
    """Does something to a pool whose workers are behind these proxies, again and again, for `seconds`.

    One worker at most is away or gives wrong answers, so that every expert has a replica that is right.
    """

    def __init__(self, pool: HurtPool, proxies: Mapping[str, ChaosProxy], rng: random.Random, seconds: float) -> None:
        self._pool = pool
        self._proxies = proxies
        self._rng = rng
        self._seconds = seconds
        self._returning: threading.Thread | None = None
        self.attached: Callable[[], bool] = lambda: True  # whether the engine reaches every worker
        self.done: Counter[str] = Counter()
        self._kinds: tuple[Callable[[Load, str], None], ...] = (
            self._kill, self._hang, self._cut, self._silence, self._lie, self._dawdle, self._move
        )  # fmt: skip

    def script(self, load: Load) -> None:
        """For `serve`."""
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            load.streams = self._rng.randint(1, MAX_NUM_SEQS)
            load.wait_steps(self._rng.randrange(5, 40))
            kind = self._rng.choice(self._kinds)
            kind(load, self._rng.choice(sorted(self._proxies)))
        self._wait_returned()

    def placement(self) -> dict[str, dict[int, list[int]]]:
        """Each expert on two or more workers."""
        names = sorted(self._proxies)
        placement: dict[str, dict[int, list[int]]] = {
            name: {layer: [] for layer in self._pool.model.layers} for name in names
        }
        for layer, spec in self._pool.model.layers.items():
            for expert in range(spec.num_experts):
                for name in self._rng.sample(names, self._rng.choice((2, 2, 2, len(names)))):
                    placement[name][layer].append(expert)
        return placement

    def _kill(self, load: Load, name: str) -> None:
        if self._returning is not None and self._returning.is_alive():
            return
        self.done["kill"] += 1
        self._pool.workers[name].kill()
        self._returning = threading.Thread(target=self._bring_back, args=(name,))
        self._returning.start()

    def _bring_back(self, name: str) -> None:
        self._pool.replace_dead()
        self._proxies[name].target = self._pool.workers[name].address
        self._pool.assign(self._pool.placement)

    def _wait_returned(self) -> None:
        if self._returning is not None:
            self._returning.join(PATIENCE)

    def _hang(self, load: Load, name: str) -> None:
        self.done["hang"] += 1
        with self._pool.workers[name].stopped():
            time.sleep(self._rng.choice((0.01, 0.1, 0.6)))

    def _cut(self, load: Load, name: str) -> None:
        self.done["cut"] += 1
        self._rng.choice((self._proxies[name].cut, self._proxies[name].half_close))()

    def _silence(self, load: Load, name: str) -> None:
        self.done["silence"] += 1
        with self._proxies[name].blackhole():
            load.wait_steps(self._rng.randrange(1, 60))

    def _lie(self, load: Load, name: str) -> None:
        self._wait_returned()
        load.wait_until(self.attached)
        self.done["lie"] += 1
        self._pool.ail(name, self._rng.choice((f"nan {self._rng.randrange(8)}", "raise", "not_held")))
        load.wait_steps(self._rng.randrange(10, 60))
        self._pool.ail(name)
        self._pool.publish(self._pool.placement)  # NOT_HELD is believed until the next epoch

    def _dawdle(self, load: Load, name: str) -> None:
        self.done["dawdle"] += 1
        self._pool.ail(name, f"slow {self._rng.choice((0.005, 0.05, 0.3))}")
        load.wait_steps(self._rng.randrange(10, 60))
        self._pool.ail(name)

    def _move(self, load: Load, name: str) -> None:
        self._wait_returned()
        self.done["move"] += 1
        old, new = self._pool.placement, self.placement()
        self._pool.assign(new)
        load.wait_until(lambda: self._pool.controller.acknowledged[-1] == self._pool.epoch)
        for owner, layers in old.items():
            keys = [(layer, e) for layer in layers for e in set(layers[layer]) - set(new[owner][layer])]
            WorkerClient(self._pool.workers[owner].address, TRUST).release(keys, term=1, epoch=self._pool.epoch)


def soak(pool: HurtPool, seconds: float, rng: random.Random, wire: str) -> tuple[Served, Counter[str]]:
    """What was served meanwhile, and how often each kind of fault happened. Leaves the workers as they are."""
    with ExitStack() as stack:
        proxies = {name: stack.enter_context(proxy_to(worker.address)) for name, worker in pool.workers.items()}
        for name, proxy in proxies.items():
            stack.callback(pool.fronts.pop, name)
            pool.fronts[name] = proxy.address
            pool.ail(name, "no_window" if wire == "mixed" and rng.random() < 0.5 else "")
        chaos = Chaos(pool, proxies, rng, seconds)
        pool.assign(chaos.placement())
        with engine_on_pool(pool, "auto" if wire == "mixed" else wire) as on:
            chaos.attached = lambda: on.attached
            served = serve(on.engine, chaos.script)
    return served, chaos.done


def belongings() -> tuple[Counter[str], Counter[str]]:
    """Of this process: its threads, but for those of the tests' own servers, and its open files by what they are."""
    gc.collect()
    threads = Counter(thread.name for thread in threading.enumerate())
    files: Counter[str] = Counter()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of the listing itself
            files[str(file.readlink()).split(":")[0]] += 1
    return Counter({name: count for name, count in threads.items() if not name.startswith("ThreadPoolExecutor")}), files


def windows() -> list[str]:
    """The shared memory of this process that still has a name."""
    return [path.name for path in Path("/dev/shm").glob(f"barista-{os.getpid()}-*")]
