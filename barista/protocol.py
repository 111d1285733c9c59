"""The version of the protocol between routers, workers and the controller. Others are refused."""

from __future__ import annotations

PROTOCOL_VERSION = 1
