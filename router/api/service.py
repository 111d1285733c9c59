"""What every route shares: the engine, the tokenizer, the bounds and the counters."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from barista.errors import InvalidRequest, NotFound, Overloaded
from barista.metrics import Metrics
from router.api.admission import Admission
from router.api.sampling import check_token_ids
from router.api.schemas import Message, TemplateOptions
from router.api.settings import ApiSettings
from router.chat_template import ChatTemplate
from router.engine_client import EngineClient
from router.messages import ModelInfo
from router.pool_client import PoolClient
from router.tokenizer import Tokenizer

LONG_TEXT = 4096  # characters; tokenising more than this takes long enough to disturb other streams

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """One application's parts. chat_template: None if the model has none. pool: None if the engine holds the experts.

    max_token_chars: the most characters that one token stands for. It takes a walk over the whole vocabulary, so it is
    done here, before anyone waits.
    """

    engine: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    settings: ApiSettings
    admission: Admission
    metrics: Metrics
    pool: PoolClient | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    max_token_chars: int = field(init=False)

    def __post_init__(self) -> None:
        longest = max(len(self.tokenizer.token_bytes(token_id)) for token_id in range(self.tokenizer.vocab_size))
        object.__setattr__(self, "max_token_chars", longest)

    @property
    def ready(self) -> bool:
        """True when a new request would be served."""
        return self.engine.ready and not self.admission.draining

    async def require_ready(self) -> None:
        """Raises Overloaded, or EngineFailed, unless a new request would be served, with every expert in reach."""
        if not self.ready:
            code = "draining" if self.admission.draining else "not_ready"
            raise Overloaded("The server is not ready.", code=code, retry_after=5)
        pool = (await self.engine.stats()).pool
        if pool is not None and pool.experts_uncovered:
            message = f"No worker in reach holds {pool.experts_uncovered} of the experts."
            raise Overloaded(message, code="experts_uncovered", retry_after=1)

    def loaded_model(self, name: str | None = None) -> ModelInfo:
        """The served model. Raises NotFound for another name, Overloaded while it loads or after the engine died."""
        if name is not None and name != self.settings.model_id:
            raise unknown_model(name)
        if not self.engine.ready:
            raise Overloaded("The model is not loaded.", code="not_ready", retry_after=5)
        return self.engine.model

    async def encode(self, text: str, *, add_special_tokens: bool, param: str = "prompt") -> tuple[int, ...]:
        """Token ids of a text. Raises InvalidRequest if it cannot fit the context, long before tokenising it."""
        max_model_len = self.engine.model.max_model_len
        if len(text) > max_model_len * self.max_token_chars:
            raise InvalidRequest(
                f"The maximum context length is {max_model_len} tokens; {len(text)} characters cannot fit.",
                param=param,
                code="context_length_exceeded",
            )
        encode = self.tokenizer.encode
        return tuple(await off_loop(len(text), lambda: encode(text, add_special_tokens=add_special_tokens)))

    async def render(
        self, messages: list[Message], options: TemplateOptions | None, *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a chat. Raises InvalidRequest without a template, or as the template does."""
        template = self.chat_template
        if template is None:
            raise InvalidRequest(
                f"{self.settings.model_id} has no chat template: it serves completions only.", param="messages"
            )
        rendered = [message.as_template() for message in messages]
        size = sum(len(message["content"]) + LONG_TEXT // 64 for message in rendered)
        kwargs = options.as_kwargs() if options else {}
        return await off_loop(
            size, lambda: template.render(rendered, add_generation_prompt=add_generation_prompt, **kwargs)
        )

    def check_prompt_ids(self, token_ids: list[int]) -> tuple[int, ...]:
        """Token ids that a client sent. Raises InvalidRequest if one is out of the vocabulary."""
        return tuple(check_token_ids(token_ids, self.engine.model.vocab_size, "prompt"))


def unknown_model(name: str) -> NotFound:
    """The answer to a model that is not served."""
    return NotFound(f"The model {name[:100]!r} does not exist.", param="model", code="model_not_found")


def cache_salt(key: bytes) -> bytes:
    """16 bytes that keep one key's prefix-cache blocks apart from all others'; empty when nobody needs a key."""
    return hashlib.sha256(key).digest()[:16] if key else b""


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Run work on `size` characters: in a thread if that could hold up the event loop, at once otherwise."""
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()
