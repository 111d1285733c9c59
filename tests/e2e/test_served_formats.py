"""house-blend served in few bits from end to end: converted, said, and answering as one expects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from router.models import prepare_built_in

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 12,
}


@pytest.fixture(scope="module", autouse=True)
def house_blend() -> Path:
    return prepare_built_in(lambda fraction, message: None)


def test_house_blend_answers_in_four_bits() -> None:
    command = [sys.executable, "-m", "router.cli", "serve", "house-blend", "--format", "int4"]
    command += ["--port", "0", "--json", "--kv-cache-tokens", "1024", "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, trust_env=False, timeout=60).json()
        process.stdin.close()
        assert process.wait(30) == 0
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["system_fingerprint"].endswith("-int4")
