"""Chat: answers arrive whole whatever is in them, history is kept, and Ctrl-C stops an answer but not the program."""

from __future__ import annotations

import hashlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, eventually, fake_app, served, tokens_of

from barista.errors import BaristaError
from router.chat import ChatClient, Conversation

ROOT = Path(__file__).parents[2]


def saying(text: str, **options: object) -> FakeEngine:
    return FakeEngine(script=lambda submit: tokens_of(text), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["Hello, the cup", "line\nline\r\nline", "a\u2028b\u0085c\x0bd", "data: [DONE]", "☕"])
@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_answer_arrives_as_it_was_said(text: str, suffix: str) -> None:
    with served(fake_app(saying(text))) as url, ChatClient(url + suffix) as client:
        assert client.model() == "house-blend"
        assert "".join(client.answer([{"role": "user", "content": "hi"}])) == text


def test_the_history_is_sent_with_each_turn() -> None:
    engine = saying("yes")
    conversation = Conversation(system="be brief")
    with served(fake_app(engine)) as url, ChatClient(url) as client:
        for question in ("one?", "two?"):
            assert "".join(conversation.say(client, question)) == "yes"
    assert conversation.messages() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "yes"},
    ]


def test_an_answer_that_is_cut_short_is_kept_and_stops_the_server_s_work() -> None:
    engine = saying("Hello" * 50, delay=0.02)
    conversation = Conversation()
    with served(fake_app(engine)) as url, ChatClient(url) as client:
        pieces = conversation.say(client, "hi")
        first = next(pieces)
        pieces.close()
        assert eventually(lambda: len(engine.aborted) == 1)
    assert conversation.turns[-1] == {"role": "assistant", "content": first}


def test_a_failed_answer_is_an_error_and_its_question_is_forgotten() -> None:
    conversation = Conversation()
    refused = pytest.raises(BaristaError, match="failed to finish")
    with served(fake_app(saying("Hello", fail=0))) as url, ChatClient(url) as client, refused:
        list(conversation.say(client, "hi"))
    assert conversation.turns == []


def test_a_missing_key_names_the_flag() -> None:
    with served(fake_app(saying("hi"), api_keys=(hashlib.sha256(b"secret").digest(),))) as url:
        with ChatClient(url) as client, pytest.raises(BaristaError, match="--api-key"):
            client.model()
        with ChatClient(url, "secret") as client:
            assert client.model() == "house-blend"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no url", "http://"])
def test_a_server_that_is_not_there_is_an_error(url: str) -> None:
    with ChatClient(url) as client, pytest.raises(BaristaError):
        client.model()


class Terminal:
    """`barista chat` on a pseudo-terminal."""

    def __init__(self, url: str) -> None:
        self.shown = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "router.cli", "chat", "--url", url],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=take_terminal,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 20.0, press: str = "") -> None:
        """press: a key to press each second until the text is shown."""
        deadline = time.monotonic() + seconds
        pressed = 0.0
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if press and time.monotonic() > pressed + 1:
                self.type(press)
                pressed = time.monotonic()
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 4096).decode()
        self.shown = self.shown.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def take_terminal() -> None:
    """Make the pseudo-terminal the one whose Ctrl-C reaches this session."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with served(fake_app(saying("Hello" * 40, delay=0.05))) as url:
        terminal = Terminal(url)
        yield terminal
        terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("/help lists the commands")
    terminal.wait_for("> ")
    # CPython's input() sleeps through a signal that comes after its first prompt and before its wait for keys.
    terminal.wait_for("Ctrl-D or /exit leaves", press="\x03")
    terminal.type("tell me\r")
    terminal.wait_for("HelloHello")
    terminal.type("\x03")
    terminal.wait_for("[stopped]")
    terminal.type("/help\r")
    terminal.wait_for("/clear ")
    terminal.type("/exit\r")
    assert terminal.process.wait(10) == 0
