"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter

from router.api.json_body import StrictJsonRoute
from router.api.openapi import POST_ERRORS
from router.api.responses import Detokenized, Tokenized
from router.api.sampling import check_token_ids
from router.api.schemas import DetokenizeRequest, TokenizeRequest
from router.api.service import Service, off_loop


def tokenization_router(service: Service) -> APIRouter:
    """The two routes."""
    router = APIRouter(route_class=StrictJsonRoute)

    @router.post("/tokenize", responses=POST_ERRORS)
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """The token ids of a prompt, or of a chat as the model would read it."""
        model = service.loaded_model(body.model)
        if body.messages is None:
            text, add_special_tokens = body.prompt or "", body.add_special_tokens is not False
        else:
            text = await service.render(
                body.messages,
                body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
            add_special_tokens = bool(body.add_special_tokens)
        tokens = await service.encode(text, add_special_tokens=add_special_tokens)
        token_strs = None
        if body.return_token_strs:
            token_strs = await off_loop(len(tokens), lambda: [service.tokenizer.token_text(i) for i in tokens])
        return {
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": list(tokens),
            "token_strs": token_strs,
        }

    @router.post("/detokenize", responses=POST_ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids, special tokens included."""
        service.loaded_model(body.model)
        check_token_ids(body.tokens, service.tokenizer.vocab_size, "tokens")
        decode = service.tokenizer.decode
        text = await off_loop(len(body.tokens), lambda: decode(body.tokens, skip_special_tokens=False))
        return {"prompt": text}

    return router
