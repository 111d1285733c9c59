"""What `barista serve` prints when it is ready: where, what, how much, and a command to try."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from barista.addresses import join
from barista.cache import size
from router.messages import ModelInfo

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def reachable(host: str, port: int) -> str:
    """host:port of a server as seen from this machine."""
    return join(ANYWHERE.get(host, host), port)


def base_url(host: str, port: int) -> str:
    """The server's address as seen from this machine, without a path."""
    return f"http://{reachable(host, port)}"


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What is known before the model is loaded. url: without a path. has_chat: the model has a chat template.

    format: of the weights in memory, with the reason if there is one. device: where it computes, if not on CPUs.
    workers: those that hold the experts, in words; empty while the engine holds them. engines: where they are, if not
    here; what is told of an own engine is left out.
    """

    url: str
    model_id: str
    path: Path
    has_chat: bool
    needs_key: bool
    format: str = ""
    device: str = ""
    threads: int = 0
    workers: str = ""
    engines: str = ""

    def as_json(self, model: ModelInfo, grpc_address: str = "") -> str:
        """For programs. grpc_address: host:port, if there is a gRPC API."""
        grpc = {"grpc": grpc_address} if grpc_address else {}
        return json.dumps({"url": self.url, "model": self.model_id} | grpc)

    def as_text(self, model: ModelInfo, grpc_address: str = "") -> str:
        """For people."""
        experts = f", {model.num_experts} experts in a layer" if model.num_experts else ""
        kv_size = size(model.kv_capacity_tokens * model.kv_bytes_per_token)
        facts = {
            "gRPC": grpc_address,
            "model": f"{self.path} ({model.num_layers} layers{experts}, {model.dtype})",
            "format": self.format,
            "device": self.device,
            "context": f"{model.max_model_len:,} tokens",
            "KV cache": "" if self.engines else f"{model.kv_capacity_tokens:,} tokens, {kv_size}",
            "threads": str(self.threads or ""),
            "workers": self.workers,
            "engines": self.engines,
        }
        lines = "".join(f"  {name:<10}{fact}\n" for name, fact in facts.items() if fact)
        return f"Ready: {self.model_id} at {self.url}/v1\n{lines}Try it:\n  {self.curl_line()}\nCtrl-C stops it."

    def curl_line(self) -> str:
        """A shell command that gets an answer from the server."""
        path, body = "completions", {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
        if self.has_chat:
            question = {"role": "user", "content": "What is the capital of France?"}
            path, body = "chat/completions", {"messages": [question], "temperature": 0}
        key = '-H "Authorization: Bearer $API_KEY" ' if self.needs_key else ""
        header = "-H 'Content-Type: application/json'"
        return f"curl {self.url}/v1/{path} {key}{header} -d {shlex.quote(json.dumps(body))}"
