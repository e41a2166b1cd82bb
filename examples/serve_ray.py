"""Serve a patched model by Ray Serve: pictures of all sizes, and policies of all requests, in one batch.

    serve run examples.serve_ray:app folder=/models/patched replicas=2 gpus=1

A request is JSON: a picture in base64 or as a data URL, a question, and, if it likes, ``"stream": true`` and a policy:
its description, such as ``{"type": "Threshold", "value": 0.5}``, a number or share of cells, or ``"disabled"`` for the
low-res view alone. Needs ``pip install 'flexkit-vlm[ray]'``.
"""

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from transformers import AsyncTextIteratorStreamer

from flexkit.errors import first_line
from flexkit.integrations.answering import Answerer, PictureQuestion

BATCH = 8
"""At most so many questions are answered at a time."""


class Options(BaseModel):
    """What ``serve run`` is told as ``name=value``."""

    folder: str
    replicas: int = 1
    gpus: float = 0
    cpus: float = 1
    max_new_tokens: int = 64


@serve.deployment(max_ongoing_requests=4 * BATCH)
class Server:
    """A replica."""

    def __init__(self, options: Options) -> None:
        self.answerer = Answerer(options.folder, options.max_new_tokens)
        # One call at a time: some base models keep a call's positions in an attribute.
        self.thread = ThreadPoolExecutor(1)

    async def __call__(self, request: Request) -> Response:
        try:
            question, stream = read(await request.json())
            if stream:
                pieces = self.stream(question)
                first = await anext(pieces, "")  # what is wrong is said before anything is answered
                return StreamingResponse(chain(first, pieces), media_type="text/plain")
            return JSONResponse({"answer": given(await self.answer(question))})
        except ValueError as error:
            return PlainTextResponse(first_line(error), 400)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.02)
    async def answer(self, questions: list[PictureQuestion]) -> list[str | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.answerer.answer, questions)

    async def stream(self, question: PictureQuestion) -> AsyncIterator[str]:
        """Pieces of an answer. It is given up when nobody reads on."""
        gone = threading.Event()
        streamer = AsyncTextIteratorStreamer(self.answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def stop(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return tokens.new_full(tokens.shape[:1], gone.is_set(), dtype=torch.bool)

        def work() -> str | Exception:
            (answer,) = self.answerer.answer([question], streamer=streamer, stopping_criteria=[stop])
            streamer.end()  # of one that failed, too
            return answer

        working = asyncio.get_running_loop().run_in_executor(self.thread, work)
        try:
            async for piece in streamer:
                if piece:
                    yield piece
            given(await working)
        finally:
            gone.set()
            working.cancel()


def read(asked: Any) -> tuple[PictureQuestion, bool]:
    """A request, and whether its answer is to come in pieces."""
    if not isinstance(asked, dict) or not isinstance(asked.get("picture"), str) or "question" not in asked:
        raise ValueError('a request is a JSON object with a "picture", in base64 or as a data URL, and a "question".')
    picture = base64.b64decode(asked["picture"].rpartition(",")[2], validate=True)
    return PictureQuestion(picture, asked["question"], asked.get("policy")), bool(asked.get("stream"))


def given(answer: str | Exception) -> str:
    """An answer, if there is one."""
    if isinstance(answer, Exception):
        raise answer
    return answer


async def chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for piece in rest:
        yield piece


def app(options: Options) -> Application:
    """What ``serve run`` runs."""
    resources = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    return Server.options(num_replicas=options.replicas, ray_actor_options=resources).bind(options)
