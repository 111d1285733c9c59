"""`barista pull` against a hub on loopback: only what is needed, verified, whole or not at all, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHA = "a" * 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 4, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 16,
}  # fmt: skip
WEIGHTS = bytes(range(256)) * 4096


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """One repository, org/tiny. damaged: files sent with another first byte. sent: names of the files sent."""

    def __init__(self) -> None:
        self.files = {
            "config.json": json.dumps(CONFIG).encode(),
            "tokenizer.json": b"{}",
            "model.safetensors": WEIGHTS,
            "pytorch_model.bin": b"never",
            "modeling_custom.py": b"never",
        }
        self.damaged: set[str] = set()
        self.sent: list[str] = []

    def description(self) -> dict[str, object]:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": git_blob_id(content),
                **({"lfs": self.large_file(content)} if name.endswith((".safetensors", ".bin")) else {}),
            }
            for name, content in self.files.items()
        ]
        return {"id": "org/tiny", "sha": SHA, "siblings": siblings}

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": git_blob_id(content)}
            for name, content in self.files.items()
        ]

    @staticmethod
    def large_file(content: bytes) -> dict[str, object]:
        return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            self._json(self.hub.tree())
        elif path.startswith("/api/models/org/tiny"):
            self._json(self.hub.description())
        elif match := re.fullmatch(rf"/org/tiny/resolve/{SHA}/(.+)", path):
            self._file(match[1])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str) -> None:
        content = self.hub.files[name]
        etag = hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else git_blob_id(content)
        body = b"?" + content[1:] if name in self.hub.damaged else content
        self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.hub.sent.append(name)
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pull(url: str, cache: Path, name: str = "org/tiny", *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "BARISTA_CACHE": str(cache), "HF_HOME": str(cache / "hub"),
        "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-m", "router.cli", "pull", name, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_pulled_model_is_whole_and_holds_no_code_and_no_pickle(hub: tuple[Hub, str], tmp_path: Path) -> None:
    done = pull(hub[1], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / "org" / "tiny"
    names = sorted(file.name for file in folder.iterdir())
    assert names == [".pulled.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_tokenizer_comes_without_the_weights_and_a_whole_model_stays_whole(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "org" / "tiny"
    for _ in range(2):
        assert pull(hub[1], tmp_path, "org/tiny", "--tokenizer-only").returncode == 0
        assert sorted(file.name for file in folder.iterdir()) == [".pulled.json", "config.json", "tokenizer.json"]
    assert "model.safetensors" not in hub[0].sent
    assert pull(hub[1], tmp_path).returncode == 0
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert pull("http://127.0.0.1:9", tmp_path, "org/tiny", "--tokenizer-only").returncode == 0
    assert (folder / "model.safetensors").exists()


def test_a_damaged_file_is_named_and_the_model_does_not_appear(hub: tuple[Hub, str], tmp_path: Path) -> None:
    hub[0].damaged.add("model.safetensors")
    done = pull(hub[1], tmp_path)
    assert done.returncode == 1
    assert "model.safetensors arrived damaged" in done.stderr
    assert not (tmp_path / "models" / "org" / "tiny").exists()


def test_a_second_attempt_downloads_only_what_is_missing(hub: tuple[Hub, str], tmp_path: Path) -> None:
    hub[0].damaged.add("model.safetensors")
    assert pull(hub[1], tmp_path).returncode == 1
    hub[0].damaged.clear()
    hub[0].sent.clear()
    assert pull(hub[1], tmp_path).returncode == 0
    assert hub[0].sent == ["model.safetensors"]


def test_a_whole_model_needs_no_connection(hub: tuple[Hub, str], tmp_path: Path) -> None:
    assert pull(hub[1], tmp_path).returncode == 0
    done = pull("http://127.0.0.1:9", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", [pytest.param("cut", marks=pytest.mark.long), "changed", "missing"])
def test_pulling_again_repairs_what_differs_and_nothing_else(hub: tuple[Hub, str], tmp_path: Path, damage: str) -> None:
    assert pull(hub[1], tmp_path).returncode == 0
    folder = tmp_path / "models" / "org" / "tiny"
    weights = folder / "model.safetensors"
    match damage:
        case "cut":
            weights.write_bytes(WEIGHTS[:-1])
        case "changed":
            weights.write_bytes(b"?" + WEIGHTS[1:])
        case "missing":
            weights.unlink()
    if damage == "cut":  # once: the hub's library tries for half a minute before it gives up
        offline = pull("http://127.0.0.1:9", tmp_path)
        assert offline.returncode == 1
        assert "with a connection" in offline.stderr
        assert "Traceback" not in offline.stderr
    hub[0].sent.clear()
    done = pull(hub[1], tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub[0].sent == ["model.safetensors"]
    assert weights.read_bytes() == WEIGHTS
    assert sorted(file.name for file in folder.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_a_repair_that_arrives_damaged_leaves_the_model_as_it_was(hub: tuple[Hub, str], tmp_path: Path) -> None:
    assert pull(hub[1], tmp_path).returncode == 0
    folder = tmp_path / "models" / "org" / "tiny"
    (folder / "model.safetensors").write_bytes(b"short")
    hub[0].damaged.add("model.safetensors")
    done = pull(hub[1], tmp_path)
    assert done.returncode == 1
    assert "model.safetensors arrived damaged" in done.stderr
    assert (folder / "model.safetensors").read_bytes() == b"short"


def test_a_model_whose_origin_is_unknown_is_compared_with_the_hub(hub: tuple[Hub, str], tmp_path: Path) -> None:
    assert pull(hub[1], tmp_path).returncode == 0
    folder = tmp_path / "models" / "org" / "tiny"
    (folder / ".pulled.json").write_text("?")
    (folder / "tokenizer.json").write_text("[]")
    assert pull(hub[1], tmp_path).returncode == 0
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert pull("http://127.0.0.1:9", tmp_path).returncode == 0


def test_an_unknown_architecture_is_refused_before_its_weights_are_downloaded(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    hub[0].files["config.json"] = json.dumps(CONFIG | {"architectures": ["FooForCausalLM"]}).encode()
    done = pull(hub[1], tmp_path)
    assert done.returncode == 1
    assert "FooForCausalLM" in done.stderr
    assert hub[0].sent == ["config.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("org/none", "no model org/none"), ("../evil", "not a model's name"), ("x", "not a model's name")],
)
def test_a_name_that_the_hub_does_not_have_is_an_error(
    hub: tuple[Hub, str], tmp_path: Path, name: str, message: str
) -> None:
    done = pull(hub[1], tmp_path, name)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_connection_the_remedy_is_named(tmp_path: Path) -> None:
    done = pull("http://127.0.0.1:9", tmp_path)
    assert done.returncode == 1
    assert "Run it again" in done.stderr
    assert "Traceback" not in done.stderr
