"""What the operator decides about the HTTP API: who may call, and how much may wait."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """Every bound of the edge.

    model_id: the name clients see. api_keys: sha256 digests (32 bytes each); empty lets everyone in. admin_keys: of the
    keys that may change the pool; empty lets nobody once there are api_keys, and everyone otherwise.
    max_body_bytes: larger bodies are answered 413. body_timeout: seconds a client may take to send its body.
    max_waiting_requests, max_waiting_tokens: sequences, and their prompt tokens, that have no token yet.
    max_open_per_key: sequences of one API key's open requests. max_n: choices per prompt. max_prompts: prompts in one
    completion.
    """

    model_id: str = "house-blend"
    api_keys: tuple[bytes, ...] = ()
    admin_keys: tuple[bytes, ...] = ()
    max_body_bytes: int = 1 << 20
    body_timeout: float = 30.0
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1 << 18
    max_open_per_key: int = 64
    max_n: int = 8
    max_prompts: int = 64
