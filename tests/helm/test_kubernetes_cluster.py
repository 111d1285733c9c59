"""Requests to the API server: which one, as whom, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import datetime
from types import SimpleNamespace

import pytest
from kubernetes.aio.config import incluster_config

from barista.errors import ConfigError
from router.kubernetes import cluster as cluster_module
from router.kubernetes.cluster import MERGE_PATCH, Cluster, ClusterError
from tests.distributed.certificates import certificates
from tests.helm.api_server import ApiServer, Tls


@pytest.fixture
def pod(tmp_path, monkeypatch):
    """The process is in a pod whose service account has the token `first`; the API server speaks TLS."""
    folder = certificates(tmp_path / "tls", "localhost")
    server = ApiServer(
        host="localhost", tls=Tls(folder / "cert.pem", folder / "key.pem", folder / "ca.pem"), token="first"
    )
    server.start()
    token = tmp_path / "token"
    token.write_text("first")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "localhost")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.pem"))
    yield SimpleNamespace(server=server, token=token)
    server.stop()


def read(cluster: Cluster):
    return cluster.get("/api/v1/namespaces/default")


def asking(act):
    """Run one thing with a connected cluster."""

    async def asks():
        cluster = await Cluster.connect()
        try:
            return await act(cluster)
        finally:
            await cluster.close()

    return asyncio.run(asks())


def test_a_pod_uses_its_service_account_over_tls(pod):
    assert asking(read)["metadata"]["name"] == "default"


def test_a_token_that_kubernetes_has_renewed_is_read_again(pod, monkeypatch):
    async def outlives_its_token(cluster):
        await read(cluster)
        pod.server.require_token("second")
        pod.token.write_text("second")
        later = datetime.datetime.now() + datetime.timedelta(minutes=2)
        clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: later), timedelta=datetime.timedelta)
        monkeypatch.setattr(incluster_config, "datetime", clock)
        return await read(cluster)

    assert asking(outlives_its_token)["kind"] == "Namespace"


def test_a_pod_without_a_token_is_told_what_is_missing(pod):
    pod.token.unlink()
    with pytest.raises(ConfigError, match="automountServiceAccountToken"):
        asking(read)


def test_a_server_that_another_authority_vouches_for_is_not_trusted(pod, tmp_path, monkeypatch):
    other = certificates(tmp_path / "other", "localhost")
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(other / "ca.pem"))
    with pytest.raises(ClusterError, match="certificate"):
        asking(read)
    assert not pod.server.requests


@pytest.mark.parametrize(("code", "text"), [(403, "403"), (500, "500 injected by the test"), (429, "429")])
def test_a_refusal_carries_its_status(api, code, text):
    api.fail_next(code)
    with pytest.raises(ClusterError, match=text) as caught:
        asking(read)
    assert caught.value.status == code


def test_a_server_that_never_answers_is_given_up(api, monkeypatch):
    monkeypatch.setattr(cluster_module, "REQUEST_SECONDS", 0.2)

    async def hang(request):
        await asyncio.sleep(600)

    monkeypatch.setattr(api, "_route", hang)
    with pytest.raises(ClusterError, match=r"no answer within 0.2 s") as caught:
        asking(read)
    assert caught.value.status == 0


def test_an_answer_that_is_not_json_is_no_answer(api, monkeypatch):
    from aiohttp import web

    async def page(request):
        return web.Response(text="<html>a proxy's page</html>")

    monkeypatch.setattr(api, "_route", page)
    with pytest.raises(ClusterError, match="no answer"):
        asking(read)


def test_a_patch_with_an_old_resource_version_conflicts(api):
    async def patches(cluster):
        path = "/api/v1/namespaces/default/configmaps/one"
        old = api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one"}, "data": {"a": "1"}})
        version = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"]}}
        await cluster.patch(path, version | {"data": {"a": "2"}}, MERGE_PATCH)
        await cluster.patch(path, version | {"data": {"a": "3"}}, MERGE_PATCH)

    with pytest.raises(ClusterError) as caught:
        asking(patches)
    assert caught.value.status == 409
    assert api.get("ConfigMap", "one")["data"] == {"a": "2"}
