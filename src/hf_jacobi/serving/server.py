"""`hf-jacobi serve`: the OpenAI-compatible server of transformers for one model, with Jacobi decoding."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError, of_usage
from ..decoding.mixin import enable, unwrap
from .bodies import LENGTHS, check, given_config
from .listening import refuse_missing_packages


if TYPE_CHECKING:
    from .compat import Runner

SWITCH = 0.0005  # seconds; with Python's 0.005, text waits for the generating thread before another thread sends it
PAGE = Path(__file__).parent / "page"
# For tokenizers without a chat template: a model that was not trained on chats gets the last message unchanged.
PLAIN = "{{ messages[-1]['content'] }}"
logger = logging.getLogger(__name__)


class Settings(GenerationConfig):
    """The generation config of a request, with the settings of ours that transformers carries along."""

    decoding: str
    jacobi: JacobiConfig
    seed: int | None


class Served:
    """
    A model to serve.

    Args:
        name: the name that clients use.
        model: decodes with Jacobi decoding.
        writer: generates the same text one token at a time, see `fastest_pair`.
        tokenizer: the tokenizer. Without a chat template it gets one that passes the last message on unchanged.
        decoding: `"ar"` or `"jacobi"`, for requests that do not choose; by default that of the model's generation
            config.
        jacobi: settings of Jacobi decoding, likewise.
    """

    def __init__(self, name: str, model, writer, tokenizer, decoding: str | None = None, jacobi=None):
        self.name, self.model, self.writer, self.tokenizer = name, enable(model), enable(writer), tokenizer
        self.config = unwrap(model).generation_config
        self.decoding = decoding or getattr(self.config, "decoding", None) or "ar"
        self.jacobi = JacobiConfig.coerce(jacobi or getattr(self.config, "jacobi", None))
        self.takes_turns = bool(tokenizer.chat_template)
        if not self.takes_turns:
            tokenizer.chat_template = ("{{ bos_token }}" if _puts_beginning(tokenizer) else "") + PLAIN
        self.runner: Runner | None = None  # set by `application`
        self.known = {*vars(GenerationConfig()), *vars(self.config)}

    def check(self, body: dict[str, Any], prompt: str) -> None:
        """Refuses an invalid request; see `check` in `bodies`."""
        check(body, prompt, self.known)

    def prepared(self, body: dict[str, Any]) -> tuple[dict[str, Any], Settings]:
        """A request for transformers, without the fields that this class reads, and its initial generation config."""
        given = given_config(body)
        length = body.get("max_completion_tokens", body.get("max_tokens"))  # transformers 5.16 reads only the second
        rest = {**body, "generation_config": None, "seed": None, "max_tokens": length}
        own = {name: value for name, value in self.config.to_dict().items() if name not in ("decoding", "jacobi")}
        with of_usage(ValueError, TypeError, AttributeError):
            return rest, Settings(**(own | given))

    def settled(self, body: dict[str, Any], config: Settings) -> Settings:
        """
        Completes the generation config that transformers built for a request: length, sampling, decoding and seed.
        """
        given = given_config(body)
        if not any(body.get(name) for name in LENGTHS) and given.keys() & {"max_new_tokens", "max_length"}:
            config.max_new_tokens = given.get("max_new_tokens")
        if "do_sample" not in given and any(body.get(name) is not None for name in ("temperature", "top_p")):
            config.do_sample = body.get("temperature") != 0
        config.decoding = given.get("decoding") or self.decoding
        if config.decoding == "ar" and given.get("jacobi") is not None:
            raise UsageError('`jacobi` contains settings of Jacobi decoding: set "decoding": "jacobi", too.')
        config.jacobi = JacobiConfig.coerce(given["jacobi"]) if given.get("jacobi") else self.jacobi
        config.seed = body.get("seed")
        if config.seed is not None:
            config.jacobi = dataclasses.replace(config.jacobi, seed=config.seed)
        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            raise UsageError("this server generates one text without beams: drop num_beams and num_return_sequences.")
        config.return_dict_in_generate = False
        return config

    def fit(self, inputs, config: Settings) -> None:
        """Refuses an empty or overlong prompt, and limits the length to the positions of the model."""
        length = inputs["input_ids"].shape[-1]
        table = getattr(unwrap(self.model).config.get_text_config(decoder=True), "max_position_embeddings", None)
        if length == 0:
            raise UsageError("the prompt is empty: give it some text.")
        if table is not None and length >= table:
            raise UsageError(f"the prompt has {length} tokens, but {self.name} has {table} positions: shorten it.")
        if table is not None and config.max_new_tokens is not None:
            config.max_new_tokens = min(config.max_new_tokens, table - length)

    def decoding_of(self, config: Settings) -> str:
        """How a request is decoded: `"ar"` or `"jacobi"`."""
        return config.decoding

    def generate(self, inputs, config: Settings, streamer=None) -> list[int]:
        """
        Generates the new tokens of a request.

        Raises:
            `UsageError`: the request needs something that is not supported.
        """
        model = self.writer if config.decoding == "ar" else self.model
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        if config.seed is not None:
            torch.manual_seed(config.seed)
        with of_usage(ValueError, ImportError):
            tokens = model.generate(**inputs, generation_config=config, tokenizer=self.tokenizer, streamer=streamer)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    def encode(self, messages: list[dict]):
        """Messages as inputs of `generate`."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def warm_up(self) -> None:
        """Generates a few tokens, so that the first request is not slow; refuses a model that is not supported."""
        for decoding in dict.fromkeys((self.decoding, "ar")):
            body = {"generation_config": {"decoding": decoding, "max_new_tokens": 3, "do_sample": False}}
            _, config = self.prepared(body)
            self.generate(self.encode([{"role": "user", "content": "a"}]), self.settled(body, config))


def _puts_beginning(tokenizer) -> bool:
    """Whether a tokenizer adds a beginning-of-sequence token."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


class EndsWithItsClient:
    """Cancels an answer, streamed or not, when its client disconnects (ASGI middleware)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, gone = asyncio.Queue(), asyncio.Event()

        async def pass_on() -> None:
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    gone.set()
                    return

        answering = asyncio.ensure_future(self.app(scope, messages.get, send))
        passing, leaving = asyncio.ensure_future(pass_on()), asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                await asyncio.wait({answering}, timeout=0.2)  # a streamed answer ends on its own
                answering.cancel()
            await answering
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
        finally:
            for task in (answering, passing, leaving):
                task.cancel()


def application(served: Served, page: dict[str, Any] | None = None, cors: bool = False):
    """
    The server, as a FastAPI application.

    Args:
        served: the model.
        page: the data for the chat page; without it, the page is not served.
        cors: whether to allow requests from pages of any origin.
    """
    refuse_missing_packages()
    from fastapi.exceptions import RequestValidationError
    from fastapi.middleware.cors import CORSMiddleware
    from starlette.exceptions import HTTPException

    from .compat import Fault, app_of

    app = app_of(served)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(EndsWithItsClient)
    app.exception_handler(UsageError)(lambda _, error: _refusal(400, str(error)))
    app.exception_handler(HTTPException)(lambda _, error: _refusal(error.status_code, str(error.detail)))
    app.exception_handler(RequestValidationError)(lambda _, error: _refusal(400, _sentence(error)))
    app.exception_handler(Fault)(_of_fault)
    if page is not None:
        add_page(app, page)
    return app


def _refusal(status: int, sentence: str):
    from fastapi.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": sentence, "type": kind, "param": None, "code": None}}, status)


def _sentence(error) -> str:
    """The error message for a body that FastAPI cannot parse."""
    first = error.errors()[0]
    return f"the body must be a JSON object ({first['msg']}: {first.get('ctx', {}).get('error', first['type'])})."


def _of_fault(request, error):
    logger.error("a request failed", exc_info=error.__cause__)
    return _refusal(500, str(error))


def add_page(app, page: dict[str, Any]) -> None:
    """Adds the chat page at `/` and what it loads: `/page/about`, `/page/chat.js`, `/page/chat.css`."""
    from fastapi.responses import FileResponse, JSONResponse

    def file(name: str):
        return lambda: FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    app.get("/", include_in_schema=False)(file("index.html"))
    for name in ("chat.js", "chat.css"):
        app.get(f"/page/{name}", include_in_schema=False)(file(name))
    app.get("/page/about", include_in_schema=False)(lambda: JSONResponse(page))


def serve(served: Served, app, listening: socket.socket, log_level: str = "warning") -> None:
    """Serves until Ctrl-C, which also cancels running answers."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None) -> None:
            if served.runner is not None:
                served.runner.cancel_all()
            await super().shutdown(sockets)

    sys.setswitchinterval(SWITCH)
    Server(uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=5)).run(sockets=[listening])


def about(served: Served, examples: list[str], **more) -> dict[str, Any]:
    """The data for the chat page: the model, its default decoding, prompts to try."""
    page = {
        "model": served.name,
        "decoding": served.decoding,
        "takes_turns": served.takes_turns,
        "examples": examples,
        "dtype": str(served.model.dtype).removeprefix("torch."),
        "device": served.model.device.type,
        **more,
    }
    return json.loads(json.dumps(page))
