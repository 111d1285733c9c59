"""With every socket but loopback refused, in the server and in all that it starts, it serves and answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import openai

# An audit hook sees the sockets of every Python library in the process, whatever they are wrapped in.
REFUSE = """
import ipaddress, os, sys

def loopback(host):
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def refuse(event, args):
    if event == "socket.getaddrinfo" and not loopback(args[0]):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple) and not loopback(args[1][0]):
        host = args[1][0]
    else:
        return
    with open(os.environ["REFUSED"], "a") as log:
        log.write(f"{event} {host}\\n")
    raise PermissionError(f"refused: {event} {host}")

sys.addaudithook(refuse)
"""


def test_it_serves_and_answers_without_a_network(tmp_path: Path) -> None:
    refused = tmp_path / "refused"
    refused.touch()
    (tmp_path / "sitecustomize.py").write_text(REFUSE)
    path = os.pathsep.join([str(tmp_path), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-m", "router.cli", "serve", "--port", "0", "--json"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path, "REFUSED": str(refused)},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        question = {"role": "user", "content": "What is the capital of France?"}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            reply = client.chat.completions.create(
                model="house-blend", messages=[question], temperature=0, max_tokens=12
            )
        assert "Paris" in (reply.choices[0].message.content or "")
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
    assert server.returncode == 0
    assert refused.read_text() == ""


def test_the_refusal_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(REFUSE)
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    log = tmp_path / "refused"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "REFUSED": str(log)}
    attempt = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, check=False)
    assert b"PermissionError" in attempt.stderr
    assert "192.0.2.1" in log.read_text()
