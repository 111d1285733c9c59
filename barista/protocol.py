"""The version of the protocol between routers, workers and the controller. Ends of different versions refuse each other."""

from __future__ import annotations

PROTOCOL_VERSION = 1
