"""What clients may send, as strict pydantic models.

A field is one of four things. Supported: declared below. Ignored: sent routinely by OpenAI clients and without
influence on the answer. Unsupported: would change the answer, so it is refused by name, unless its value asks for
nothing. Unknown: refused by name, because a misspelt `temperature` must not pass silently. null means "not sent".
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

INT64_MAX = 2**63 - 1

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Length = Annotated[int, Field(ge=1, le=INT64_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=64)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
TokenIdKey = Annotated[str, Field(pattern="^[0-9]{1,10}$")]


def _at_most_300(value: Any) -> Any:
    """Refuse a huge object before each of its entries adds an error of its own."""
    if isinstance(value, dict) and len(value) > 300:
        raise PydanticCustomError("too_long", "At most 300 token ids are allowed, not {length}", {"length": len(value)})
    return value


LogitBias = Annotated[
    dict[TokenIdKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300), BeforeValidator(_at_most_300)
]


class StrictModel(BaseModel):
    """No coercion, no NaN or infinity, no unknown field.

    IGNORED: names that are dropped. UNSUPPORTED: name -> the values, beside null, that ask for nothing.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data.keys() - cls.model_fields.keys() - cls.IGNORED:
            if name not in cls.UNSUPPORTED:
                raise PydanticCustomError("unknown_parameter", "Unknown parameter: {param}", {"param": name[:100]})
            if data[name] is not None and data[name] not in cls.UNSUPPORTED[name]:
                raise PydanticCustomError("unsupported_parameter", "{param} is not supported here", {"param": name})
        return {name: value for name, value in data.items() if name in cls.model_fields}


class StreamOptions(StrictModel):
    """include_usage: a last chunk with the token counts."""

    IGNORED = frozenset({"include_obfuscation", "continuous_usage_stats"})

    include_usage: bool | None = None


class GenerateRequest(StrictModel):
    """What both kinds of generation take. Defaults are in router.api.sampling."""

    IGNORED = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )

    model: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31, description="0 and -1: off")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: LogitBias | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    ignore_eos: bool | None = None
    n: Length | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were sent."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(StrictModel):
    """The one kind of content part that a text model reads."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """One message of a chat. A client may send back an answer as it received it, empty fields included."""

    IGNORED = frozenset({"refusal", "annotations", "reasoning_content", "reasoning"})
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"tool_calls": ([],), "function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)]
    name: str | None = None
    tool_call_id: str | None = None

    def as_template(self) -> dict[str, Any]:
        """The message as chat templates take it: the parts' texts joined, `developer` under its older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        extra = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {name: value for name, value in extra.items() if value is not None}


class TemplateOptions(StrictModel):
    """What a client may tell a chat template beside the messages; router.chat_template lets nothing else in."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None

    def as_kwargs(self) -> dict[str, Any]:
        """What was sent."""
        return self.model_dump(exclude_none=True)


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]


class ChatCompletionRequest(GenerateRequest):
    """POST /v1/chat/completions."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "best_of": (1,),
    }

    messages: Messages
    chat_template_kwargs: TemplateOptions | None = None
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(GenerateRequest):
    """POST /v1/completions."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,), "suffix": ("",)}

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1)]
        | Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
        | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(fail_fast=True, min_length=1)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, however they were sent."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(StrictModel):
    """POST /tokenize, in vLLM's shape: a prompt or the messages of a chat."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("missing", "Send either prompt or messages", {"param": "prompt"})
        return self


class DetokenizeRequest(StrictModel):
    """POST /detokenize, in vLLM's shape."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: TokenIds


class DrainRequest(StrictModel):
    """POST /pool/drain. worker: its name, as GET /pool shows it."""

    worker: Annotated[str, Field(min_length=1, max_length=128)]


class ScaleRequest(StrictModel):
    """POST /pool/scale. workers: how many there shall be."""

    workers: Annotated[int, Field(ge=1, le=4096)]


class RebalanceRequest(StrictModel):
    """POST /pool/rebalance. dry_run: plan the moves, make none."""

    dry_run: bool | None = None
