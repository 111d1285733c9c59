"""`barista chat`: a conversation in the terminal, or one answer per line of standard input."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from router.chat import ChatClient, Conversation

LEAVE = ("/exit", "/quit")
HELP = """\
/help         show this
/clear        forget the conversation
/system TEXT  set the system prompt and forget the conversation; without TEXT: none
/exit         leave; so does Ctrl-D
Ctrl-C stops an answer."""


def command(
    model: str | None = typer.Argument(None, help="Model to serve meanwhile.", show_default="house-blend"),
    url: str | None = typer.Option(None, help="Talk to the server at this address instead."),
    api_key: str | None = typer.Option(None, envvar="BARISTA_API_KEY", show_envvar=True, help="Key for that server."),
    system: str = typer.Option("", help="System prompt."),
    temperature: float = typer.Option(0.2, min=0.0, help="0 always takes the likeliest token; 1 draws as trained."),
    max_tokens: int | None = typer.Option(None, min=1, help="Longest answer."),
) -> None:
    """Talk to a model. Streams; keeps the history; /help lists the commands.

    If standard input is no terminal, each of its lines is a turn and only the answers are printed.
    """
    if model is not None and url is not None:
        raise typer.BadParameter("give MODEL or --url, not both", param_hint="MODEL")
    from barista.config import ServeConfig
    from router.background import background_server
    from router.chat import ChatClient, Conversation

    with contextlib.ExitStack() as stack:
        address = url or stack.enter_context(background_server(model or ServeConfig.model))
        client = stack.enter_context(ChatClient(address, api_key, temperature=temperature, max_tokens=max_tokens))
        name = client.model()
        conversation = Conversation(system=system)
        if sys.stdin.isatty():
            typer.echo(f"{name} at {client.url}. /help lists the commands.", err=True)
            _talk(client, conversation)
        else:
            _answer_lines(client, conversation)


def _answer_lines(client: ChatClient, conversation: Conversation) -> None:
    for line in map(str.strip, sys.stdin):
        if line in LEAVE:
            return
        if line and not _obey(line, conversation):
            _print_answer(client, conversation, line)


def _talk(client: ChatClient, conversation: Conversation) -> None:
    from barista.errors import BaristaError

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() its line editing and history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D or /exit leaves.")
            continue
        if line in LEAVE:
            return
        if not line or _obey(line, conversation):
            continue
        try:
            _print_answer(client, conversation, line)
        except KeyboardInterrupt:
            typer.echo(" [stopped]")
        except BaristaError as error:
            typer.secho(f"error: {error}", fg="red", err=True)


def _print_answer(client: ChatClient, conversation: Conversation, text: str) -> None:
    with contextlib.closing(conversation.say(client, text)) as pieces:
        for piece in pieces:
            typer.echo(piece, nl=False)
    typer.echo()


def _obey(line: str, conversation: Conversation) -> bool:
    """Carry out a line that is a command; False if it is something to say."""
    if not line.startswith("/"):
        return False
    name, _, text = line.partition(" ")
    match name:
        case "/clear":
            conversation.turns.clear()
        case "/system":
            conversation.system = text.strip()
            conversation.turns.clear()
        case "/help":
            typer.echo(HELP)
        case _:
            typer.echo(f"{name} is not a command.\n{HELP}")
    return True
