"""A model's own chat template: Jinja source from its files, rendered in a sandbox that can change nothing."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from barista.errors import CheckpointError, InvalidRequest
from router.api.schemas import TemplateOptions

# What a client may set in a template beside messages and tools.
ALLOWED_KWARGS = frozenset(TemplateOptions.model_fields)
MAX_MESSAGE_CHARS = 300

# What templates raise, in practice, for messages that they were not written for.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """Renders a list of messages to the prompt that the model was trained on.

    The environment is that of transformers (utils/chat_template_utils.py), so that a template gives the same text.
    Compiled once; raises CheckpointError if it is not valid Jinja.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _SafeNamespace,
        }
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise CheckpointError(
                f"The model's chat template is not valid Jinja: {str(error)[:MAX_MESSAGE_CHARS]}.",
                "Such a model serves completions only, once its chat template is removed.",
            ) from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt, special tokens written out, so encode it without adding them again.

        messages, tools: plain JSON values in OpenAI's form. kwargs: of ALLOWED_KWARGS. Raises InvalidRequest for
        another name and for messages that the template refuses.
        """
        unknown = sorted(kwargs.keys() - ALLOWED_KWARGS)
        if unknown:
            raise InvalidRequest(
                f"Unknown chat template argument {unknown[0]!r}; known: {', '.join(sorted(ALLOWED_KWARGS))}.",
                param="chat_template_kwargs",
            )
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
                **kwargs,
            )
        except _RENDER_ERRORS as error:
            reason = f"{error or type(error).__name__}"[:MAX_MESSAGE_CHARS]
            raise InvalidRequest(f"The chat template refuses these messages: {reason}", param="messages") from error


class _GenerationTag(Extension):
    """{% generation %} marks what the assistant wrote, for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it an instance variable

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """jinja2's namespace(), but no underscore name can be stored: the sandbox does not check what reads them back."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _check_attribute(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
