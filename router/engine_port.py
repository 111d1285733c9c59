"""Where engines listen unless they are told otherwise."""

from __future__ import annotations

ENGINE_PORT = 50051
