"""A Kubernetes API server for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helm.api_server import ApiServer


@pytest.fixture
def api(tmp_path, monkeypatch) -> Iterator[ApiServer]:
    """A running API server; KUBECONFIG names it for clients in this process and in those that it starts."""
    server = ApiServer(groups=("ray.io", "monitoring.coreos.com"))
    server.start()
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    yield server
    server.stop()
