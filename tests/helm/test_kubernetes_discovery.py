"""The router's endpoints follow the API server's, whatever happens on the way."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing, asynccontextmanager

import pytest

from barista.errors import ConfigError
from router.kubernetes import discovery
from router.kubernetes.discovery import addresses, watch_endpoints

SOON = 5.0  # seconds within which a change must show
NEVER = 600.0


def a_slice(name="engine-1", hosts=("10.0.0.1",), *, port=50051, port_name="engine", family="IPv4", ready=True):
    endpoints = [{"addresses": [host], "conditions": {"ready": ready}} for host in hosts]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "engine"}},
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{"name": "dashboard", "port": 8265}, {"name": port_name, "port": port}],
    }


class Seen:
    """What a stream has yielded last, and how often it has yielded."""

    def __init__(self):
        self.latest = None
        self.times = 0
        self.changed = asyncio.Event()

    async def until(self, *wanted, within=SOON):
        """Until the stream's latest set is this one."""
        async with asyncio.timeout(within):
            while self.latest != frozenset(wanted):
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def discovering(relist_seconds=NEVER):
    seen = Seen()

    async def follow():
        async with aclosing(watch_endpoints("default", "engine", "engine", relist_seconds)) as stream:
            async for found in stream:
                seen.latest = found
                seen.times += 1
                seen.changed.set()

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(holds, within=SOON):
    async with asyncio.timeout(within):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(discovery, "FIRST_RETRY_SECONDS", 0.05)


def test_it_yields_what_is_there_and_then_each_change(api):
    async def follows():
        async with discovering() as seen:
            await seen.until()
            api.put(a_slice(hosts=("10.0.0.1",)))
            await seen.until("10.0.0.1:50051")
            api.put(a_slice("engine-2", ("10.0.0.2",)))
            await seen.until("10.0.0.1:50051", "10.0.0.2:50051")
            api.put(a_slice(hosts=("10.0.0.3",)))
            await seen.until("10.0.0.3:50051", "10.0.0.2:50051")
            api.delete("EndpointSlice", "engine-2")
            await seen.until("10.0.0.3:50051")
            assert seen.times == 5

    asyncio.run(follows())


def test_every_request_carries_the_kubeconfigs_token(api):
    async def follows():
        async with discovering() as seen:
            await seen.until()
            await until(lambda: api.watching() == 1)

    asyncio.run(follows())
    assert [(request.verb, request.token) for request in api.requests] == [("list", "test"), ("watch", "test")]


def test_other_services_and_unchanged_sets_are_not_yielded(api):
    async def follows():
        api.put(a_slice())
        async with discovering() as seen:
            await seen.until("10.0.0.1:50051")
            other = a_slice("other-1", ("10.9.9.9",))
            other["metadata"]["labels"]["kubernetes.io/service-name"] = "other"
            api.put(other)
            api.put(a_slice(ready=False))
            api.put(a_slice("engine-2", ("10.0.0.2",)))
            await seen.until("10.0.0.1:50051", "10.0.0.2:50051")
            assert seen.times == 2

    asyncio.run(follows())


def test_a_delete_that_no_watch_told_of_shows_after_the_reconnect(api):
    async def follows():
        api.put(a_slice())
        api.put(a_slice("engine-2", ("10.0.0.2",)))
        async with discovering() as seen:
            await seen.until("10.0.0.1:50051", "10.0.0.2:50051")
            await until(lambda: api.watching() == 1)
            api.delete("EndpointSlice", "engine-2", unheard=True)
            api.drop_watches()
            await seen.until("10.0.0.1:50051")

    asyncio.run(follows())


def test_a_silent_watch_is_made_good_by_the_next_list(api):
    async def follows():
        api.silent_watches = True
        api.put(a_slice())
        async with discovering(relist_seconds=0.3) as seen:
            await seen.until("10.0.0.1:50051")
            api.put(a_slice("engine-2", ("10.0.0.2",)))
            await seen.until("10.0.0.1:50051", "10.0.0.2:50051")
            api.delete("EndpointSlice", "engine-2")
            await seen.until("10.0.0.1:50051")

    asyncio.run(follows())


def test_410_gone_leads_to_a_fresh_list(api):
    async def follows():
        api.put(a_slice())
        async with discovering() as seen:
            await seen.until("10.0.0.1:50051")
            await until(lambda: api.watching() == 1)
            api.forget_history()
            api.put(a_slice("engine-2", ("10.0.0.2",)))
            await seen.until("10.0.0.1:50051", "10.0.0.2:50051")

    asyncio.run(follows())


def test_410_gone_inside_a_watch_leads_to_a_fresh_list(api):
    async def follows():
        api.put(a_slice())
        async with discovering() as seen:
            await seen.until("10.0.0.1:50051")
            await until(lambda: api.watching() == 1)
            api.silent_watches = True
            api.put(a_slice("engine-2", ("10.0.0.2",)))
            api.store.forget_history()
            api.silent_watches = False
            await seen.until("10.0.0.1:50051", "10.0.0.2:50051")

    asyncio.run(follows())


def test_the_last_known_list_stands_while_the_api_server_is_away(api):
    async def follows():
        api.put(a_slice())
        async with discovering() as seen:
            await seen.until("10.0.0.1:50051")
            await asyncio.to_thread(api.stop)
            await asyncio.sleep(0.3)
            assert seen.latest == {"10.0.0.1:50051"}
            assert seen.times == 1
            api.put(a_slice("engine-2", ("10.0.0.2",)))
            await asyncio.to_thread(api.start)
            await seen.until("10.0.0.1:50051", "10.0.0.2:50051")

    asyncio.run(follows())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_happens_the_set_becomes_the_true_one(api, seed, monkeypatch):
    monkeypatch.setattr(discovery, "LONGEST_RETRY_SECONDS", 0.1)
    chance = random.Random(seed)
    there = {}

    def add():
        number = chance.randrange(6)
        there[number] = tuple(f"10.{number}.0.{host}" for host in range(chance.randrange(4)))
        api.put(a_slice(f"engine-{number}", there[number]))

    def remove():
        if there:
            number = chance.choice(sorted(there))
            del there[number]
            unheard = chance.random() < 0.5
            api.delete("EndpointSlice", f"engine-{number}", unheard=unheard)
            if unheard:
                api.drop_watches()

    def fail():
        api.fail_next(chance.choice([403, 410, 500, 504]), lambda request: request.verb in ("list", "watch"))

    async def follows():
        async with discovering(relist_seconds=0.5) as seen:
            for _ in range(60):
                chance.choice([add, add, add, remove, remove, api.drop_watches, api.forget_history, fail])()
                await asyncio.sleep(chance.choice([0, 0, 0.01, 0.05]))
            await seen.until(*(f"{host}:50051" for hosts in there.values() for host in hosts))

    asyncio.run(follows())


def test_a_refused_list_is_tried_again_and_names_the_role(api, caplog):
    async def follows():
        api.put(a_slice())
        api.deny(lambda request: request.resource == "endpointslices")
        async with discovering() as seen:
            await until(lambda: "Allow list and watch of endpointslices" in caplog.text)
            assert seen.latest is None
            api.deny(lambda request: False)
            await seen.until("10.0.0.1:50051")

    asyncio.run(follows())


def test_watches_that_end_at_once_do_not_become_a_storm_of_lists(api):
    async def follows():
        api.put(a_slice())
        for _ in range(100):
            api.fail_next(500, lambda request: request.verb == "watch")
        async with discovering() as seen:
            await seen.until("10.0.0.1:50051")
            await asyncio.sleep(1.0)
        assert sum(request.verb == "list" for request in api.requests) < 8

    asyncio.run(follows())


def test_several_hundred_endpoints_in_slices_of_a_hundred(api):
    async def follows():
        hosts = [f"10.1.{number // 250}.{number % 250 + 1}" for number in range(700)]
        for first in range(0, 700, 100):
            api.put(a_slice(f"engine-{first}", hosts[first : first + 100]))
        async with discovering() as seen:
            await seen.until(*(f"{host}:50051" for host in hosts))
            api.put(a_slice("engine-0", hosts[:99]))
            await seen.until(*(f"{host}:50051" for host in hosts if host != hosts[99]))

    asyncio.run(follows())


def test_the_connection_ends_with_the_stream(api):
    async def follows():
        async with discovering() as seen:
            await seen.until()
            await until(lambda: api.watching() == 1)
        await until(lambda: api.watching() == 0)

    asyncio.run(follows())


def test_ipv6_addresses_stand_in_brackets():
    assert addresses([a_slice(hosts=("fd00::7",), family="IPv6")], "engine") == {"[fd00::7]:50051"}


def test_a_pod_of_a_dual_stack_service_has_one_address():
    four, six = a_slice(hosts=("10.0.0.1",)), a_slice("engine-6", ("fd00::7",), family="IPv6")
    for item in (four, six):
        item["endpoints"][0]["targetRef"] = {"kind": "Pod", "uid": "1234"}
    assert addresses([four, six], "engine") == addresses([six, four], "engine") == {"10.0.0.1:50051"}


def test_endpoints_that_are_not_ready_are_candidates_too():
    assert addresses([a_slice(ready=False)], "engine") == {"10.0.0.1:50051"}


@pytest.mark.parametrize("change", [{"endpoints": None}, {"ports": None}, {"addressType": "FQDN"}])
def test_a_slice_without_addresses_for_the_port_counts_for_nothing(change):
    assert addresses([a_slice() | change, a_slice("other", port_name="other")], "engine") == frozenset()


def test_without_a_cluster_the_error_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="KUBECONFIG"):
        asyncio.run(anext(watch_endpoints("default", "engine", "engine")))


def test_a_kubeconfig_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="missing"):
        asyncio.run(anext(watch_endpoints("default", "engine", "engine")))
