"""
What is private to the server of transformers (`transformers serve`), or differs between its versions.

`app_of` builds that server for one loaded model. Unlike `transformers serve`, it does not load the model itself, sends
text together with the number of tokens of each forward, and refuses a request that it cannot serve before the first
token. `tests/decoding/test_compat.py` asserts that each private name exists.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    ReasoningText,
    _GenerationCancelled,
    _StreamError,
)

from ..decoding.errors import UsageError


if TYPE_CHECKING:
    from .server import Served

    TextHandler = ChatCompletionHandler  # stands for all of `HANDLERS`: they share the methods that are overridden
else:
    TextHandler = object


HANDLERS = {
    "chat_handler": (ChatCompletionHandler, "messages"),
    "completion_handler": (CompletionHandler, "prompt"),
    "response_handler": (ResponseHandler, "input"),
}
PACE = 0.008  # seconds between two pieces of text, at least: nobody sees more, and each one slows a small model down


class Fault(Exception):
    """A bug that occurred during generation; its cause is the original error. Users' errors are `UsageError`."""


class Text(str):
    """
    The text generated since the last piece.

    Attributes:
        report: what is sent beside it, see `Streamer.send`.
    """

    report: dict[str, Any] | None = None


class Thought(ReasoningText):
    """The same for reasoning."""

    report: dict[str, Any] | None = None


class Streamer(DirectStreamer):
    """
    Sends the text of each forward, and at the end how long generation took.

    Args:
        tokenizer: the Rust tokenizer inside the fast tokenizer.
        loop: the event loop of the server.
        parser: transformers' parser of answers, or `None`.
        decoding: `"ar"` or `"jacobi"`.
    """

    def __init__(self, tokenizer, loop: asyncio.AbstractEventLoop, parser, decoding: str):
        self.items: list[Any] = []
        self.forwards: list[tuple[int, int]] = []
        self.counted = self.length = 0
        self.decoding, self.loop = decoding, loop
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.began = loop.create_future()  # done at the first token, or failed if an error came first
        self.began.add_done_callback(lambda began: began.cancelled() or began.exception())
        self.start, self.due = time.perf_counter(), 0.0
        super().__init__(tokenizer, loop, self.queue, response_parser=parser)

    def put(self, value) -> None:
        super().put(value)
        if self.decoding == "ar" and self.total_tokens:
            self.end_forward()

    def _enqueue(self, item) -> None:
        if isinstance(item, str):
            self.length += len(item)
        self.items.append(item)

    def end_forward(self) -> None:
        """Called after the last token of a forward."""
        self.forwards.append((self.total_tokens - self.counted, self.length))
        self.counted, self.length = self.total_tokens, 0
        if (now := time.perf_counter()) >= self.due:
            self.due = now + PACE
            self.send()

    def end(self) -> None:
        super().end()
        self.items.remove(None)
        if self.length or self.total_tokens > self.counted:
            self.forwards.append((self.total_tokens - self.counted, self.length))
        self.send({"seconds": time.perf_counter() - self.start})
        self.close(None)

    def send(self, more: dict[str, Any] | None = None) -> None:
        """
        Sends the collected items. The last piece of text carries a report, the field `decoding` of its event: `by`,
        `"ar"` or `"jacobi"`; `forwards`, the numbers of tokens and of characters of each forward; and, at the end of
        the answer, `seconds`, the time that generation took.
        """
        items = [one for kind, run in groupby(self.items, type) for one in _joined(kind, list(run))]
        if more or items:
            if not items or not isinstance(items[-1], (Text, Thought)):
                items.append(Text())
            items[-1].report = {"by": self.decoding, "forwards": self.forwards, **(more or {})}
            self.items, self.forwards = [], []
        self.loop.call_soon_threadsafe(self.deliver, items)

    def deliver(self, items: list) -> None:
        """On the event loop: passes items to the response."""
        if not self.began.done():
            self.began.set_result(None)
        for item in items:
            self.queue.put_nowait(item)

    def close(self, error: Exception | None) -> None:
        """Ends the stream, with or without an error."""
        self.loop.call_soon_threadsafe(self.conclude, error)

    def conclude(self, error: Exception | None) -> None:
        """On the event loop: `close`."""
        if error is not None and not self.began.done():
            self.began.set_exception(error)
        elif error is not None:
            self.queue.put_nowait(_StreamError(json.dumps(f"{error}")[1:-1]))  # transformers adds the quotes
        self.deliver([None])

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


def _joined(kind: type, items: list[Any]) -> list[Any]:
    """Joins pieces of text of one kind; leaves other items unchanged."""
    if not issubclass(kind, str):
        return items
    return [(Thought if issubclass(kind, ReasoningText) else Text)("".join(items))]


class Silent:
    """The streamer of an answer that is sent in one piece: it only cancels."""

    def __init__(self):
        self.is_cancelled = False

    def put(self, value) -> None:
        if self.is_cancelled:
            raise _GenerationCancelled()

    def end(self) -> None:
        pass

    def cancel(self) -> None:
        self.is_cancelled = True


class Runner(GenerateManager):
    """Generates one answer at a time on one thread, with `served.generate(inputs, config, streamer)`."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.served = served
        self.live: set[Streamer | Silent] = set()  # of the answers that are not finished
        self.latest: Streamer | None = None
        self.has_ended = False

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        self.served.fit(inputs, gen_config)
        tokenizer, loop = processor._tokenizer, asyncio.get_running_loop()
        streamer = Streamer(tokenizer, loop, response_parser, self.served.decoding_of(gen_config))
        self.latest = streamer
        self.submit(self.stream, inputs, gen_config, streamer)
        return streamer.queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        self.served.fit(inputs, gen_config)
        streamer = Silent()
        future = self.async_submit(self.whole, inputs, gen_config, streamer)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            tokens = await asyncio.shield(future)
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        return processor.decode(tokens, skip_special_tokens=True), inputs["input_ids"].shape[-1], tokens

    def stream(self, inputs, gen_config, streamer: Streamer) -> None:
        """On the thread: generates a streamed answer."""
        streamer.start = time.perf_counter()
        try:
            self.whole(inputs, gen_config, streamer)
        except _GenerationCancelled:
            streamer.close(None)
        except Exception as error:
            streamer.close(error)

    def whole(self, inputs, gen_config, streamer: Streamer | Silent) -> list[int]:
        """On the thread: generates an answer and returns its tokens."""
        self.live.add(streamer)
        try:
            if streamer.is_cancelled or self.has_ended:
                raise _GenerationCancelled()
            return self.served.generate(inputs, gen_config, streamer)
        except (UsageError, _GenerationCancelled):
            raise
        except Exception as error:
            raise Fault(f"{type(error).__name__}: {error}") from error
        finally:
            self.live.discard(streamer)

    def cancel_all(self) -> None:
        """Cancels every answer, including those still waiting, when the server shuts down."""
        self.has_ended = True
        for streamer in list(self.live):
            streamer.cancel()


class State(GenerationState):
    """Passes every request to one `Runner`."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.runner = served.runner = Runner(served)

    def get_manager(self, model_id, use_cb=False):
        return self.runner


class Manager(ModelManager):
    """Manages one model, which is already loaded and stays loaded."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.served, self.force_model = served, served.name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id, **settings):
        return self.served.model, self.served.tokenizer

    async def load_model_streaming(self, model_id, gguf_file=None):
        """The answer to the request that `transformers chat` makes before its first message."""
        found = {"status": "ready", "model": model_id, "cached": True}
        if model_id != self.served.name:
            found = {"status": "error", "model": model_id, "message": f"this server only serves {self.served.name}"}
        yield f"data: {json.dumps(found)}\n\n"

    def list_models(self, cache_dir=None) -> list[dict]:
        return [
            {
                "owned_by": "hf_jacobi",
                "id": self.served.name,
                "object": "model",
                "created": 0,
                "status": {"value": "loaded"},
            }
        ]

    get_gen_models = list_models  # its name before transformers 5.18

    def shutdown(self) -> None:
        """Keeps the model, because any client can request a shutdown (`/reset`)."""


class Handler(TextHandler):
    """What this server adds to the three text handlers of transformers."""

    prompt = ""  # the field of the prompt
    model_manager: Manager
    generation_state: State

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        self.model_manager.served.check(body, self.prompt)

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        served = self.model_manager.served
        config = super()._build_generation_config(*served.prepared(body), use_cb=use_cb)
        return served.settled(body, config)

    async def handle_request(self, body: dict, request_id: str):
        try:
            response = await super().handle_request(body, request_id)
        except (HTTPException, UsageError, Fault):
            raise
        except _GenerationCancelled as error:
            raise HTTPException(503, "the server is shutting down.") from error
        except Exception as error:  # only reading the body is left as a cause
            raise UsageError(f"the request cannot be read ({type(error).__name__}: {error}).") from error
        streamer = getattr(response, "streamer", None)
        if streamer is not None:
            try:
                await asyncio.shield(streamer.began)
            except asyncio.CancelledError:
                streamer.cancel()
                raise
        return response

    def _streaming(self, *args, **settings):
        response = super()._streaming(*args, **settings)
        response.streamer = self.generation_state.runner.latest
        return response

    def _build_chunk_sse(self, *args, **settings) -> str:
        line = super()._build_chunk_sse(*args, **settings)
        pieces = (settings.get(name) for name in ("content", "reasoning_content", "text"))
        reports = (piece.report for piece in pieces if isinstance(piece, (Text, Thought)))
        report = next(filter(None, reports), None)
        return line if report is None else f'{line.rstrip()[:-1]},"decoding":{json.dumps(report)}}}\n\n'


class Refusing:
    """Replaces the handlers for other kinds of models."""

    async def handle_request(self, *args):
        raise UsageError("this server generates text: use /v1/chat/completions, /v1/completions or /v1/responses.")


def app_of(served: Served) -> Any:
    """
    transformers' server for one model, as a FastAPI application.

    Args:
        served: a `hf_jacobi.serving.server.Served`.
    """
    state = State(served)
    manager = Manager(served)
    handlers: dict[str, Any] = {
        name: type(kind.__name__, (Handler, kind), {"prompt": prompt})(manager, state)
        for name, (kind, prompt) in HANDLERS.items()
    }
    taken = inspect.signature(build_server).parameters
    others: dict[str, Any] = {name: Refusing() for name in taken if "handler" in name and name not in handlers}
    return build_server(manager, **handlers, **others, generation_state=state)
