"""Ray Serve and Ray Data, asked as their users ask; `make test-engines` installs what this needs."""

import base64
import gc
import io
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Cache

import flexkit
from flexkit.visual_search import Question, draw_scene, load_model, questions
from tests.scripts import load_example

pytest.importorskip("ray")
pytest.importorskip("grpc_reflection")
import ray
import requests
from ray import serve

COUNT = 60
SIZES = (200, 250, 333, 480)
POLICIES: list[tuple[Any, dict[str, Any]]] = [
    (None, {}),
    ("disabled", {"hd_disabled": True}),
    (0.2, {"hd_policy": flexkit.TopK(0.2)}),
    (
        {"type": "Dilated", "policy": {"type": "TopK", "k": 2}, "cells": 1},
        {"hd_policy": flexkit.TopK(2).dilated(1)},
    ),
    (1, {"hd_policy": flexkit.TopK(1)}),
]
"""As a request has them, and as ``generate`` does."""
REPLICAS = 2
WAIT = 60
"""Seconds after which what should have happened has not."""


@dataclass(frozen=True)
class Case:
    """A request, and what the model says to it alone."""

    picture: bytes
    question: Question
    policy: Any
    answer: str

    def body(self, **more: Any) -> dict[str, Any]:
        picture = base64.b64encode(self.picture).decode()
        return {"picture": picture, "question": self.question.text, "policy": self.policy} | more


def save(folder: Path, endless: bool = False) -> Path:
    """The shipped model, in float64: what rounding decides is the same in every batch."""
    model, processor = load_model()
    if endless:
        model.generation_config.eos_token_id = None
    model.double().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[Case]:
    """Answered one by one in this process."""
    model, processor = flexkit.from_pretrained(folder), flexkit.FlexProcessor.from_pretrained(folder)
    made = []
    for index in range(COUNT):
        scene = draw_scene(500 + index, SIZES[index % len(SIZES)])
        question = next(asked for asked in questions(scene, "attribute") if asked.about == "digit")
        content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        policy, settings = POLICIES[index % len(POLICIES)]
        tokens = model.generate(**inputs, **settings, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        scene.image.save(file := io.BytesIO(), "PNG")
        made.append(Case(file.getvalue(), question, policy, processor.decode(tokens, skip_special_tokens=True).strip()))
    right = [
        sum(case.answer == case.question.answer for case in made[start :: len(POLICIES)])
        for start in range(len(POLICIES))
    ]
    assert right[0] == COUNT // len(POLICIES) > 2 * right[1]  # policies of requests matter
    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray of this machine alone, that leaves nothing in the user's folders."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:  # paths of sockets are short
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=2**27,
            log_to_driver=False,
            _temp_dir=place,
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


@pytest.fixture
def served(cluster: None) -> Iterator[Callable[..., tuple[str, Any]]]:
    """Runs an application of the example, whose replicas can be watched; returns its address and a handle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def run(**options: Any) -> tuple[str, Any]:
        example = load_example("serve_ray")
        example.Server = example.Server.options(func_or_class=watched(example))
        return f"http://127.0.0.1:{port}/", serve.run(example.app(example.Options(cpus=1, **options)))

    yield run
    serve.shutdown()


def watched(example: ModuleType) -> type:
    class Server(example.Server.func_or_class):  # type: ignore[misc,name-defined]
        """Says which replica answers, how many it has answered at once, and what it holds."""

        def __init__(self, options: Any) -> None:
            super().__init__(options)
            self.most, self.begun, answer = 0, 0, self.answerer.answer

            def counted(asked: Any, **options: Any) -> Any:
                self.most, self.begun = max(self.most, len(asked)), self.begun + 1
                return answer(asked, **options)

            self.answerer.answer = counted

        async def __call__(self, request: Any) -> Any:
            response = await super().__call__(request)
            response.headers.update({"replica": str(os.getpid()), "most": str(self.most)})
            return response

        async def held(self) -> tuple[int, int, int]:
            """Calls that have begun, KV caches, and bytes of tensors, that are alive: without a collection."""
            alive = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor | Cache)]
            caches = sum(isinstance(each, Cache) for each in alive)
            storages = {
                each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
                for each in alive
                if isinstance(each, torch.Tensor)
            }
            return self.begun, caches, sum(storages.values())

    return Server


def ask(address: str, bodies: list[dict[str, Any]]) -> list[requests.Response]:
    """All at a time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: requests.post(address, json=body, timeout=WAIT), bodies))


def test_many_requests_at_a_time(served: Any, folder: Path, cases: list[Case]) -> None:
    """Of mixed sizes and policies, in batches of two replicas; and some that fail alone."""
    address, _ = served(folder=str(folder), replicas=REPLICAS, max_new_tokens=4)
    good = cases[0].body()
    wrong = {
        "cannot be read: image file is truncated": good | {"picture": good["picture"][: len(good["picture"]) // 8 * 4]},
        "cannot be read: cannot identify": good | {"picture": base64.b64encode(b"no picture").decode()},
        "base64": good | {"picture": "https://127.0.0.1/picture.png"},
        'its description, a number or share of cells, or "disabled"; got': good | {"policy": "most"},
        "image": good | {"question": "Which <image> is it?"},  # refused where a batch is prepared
        'with a "picture"': {"question": good["question"]},
    }
    bodies = [case.body() for case in cases]
    bodies[1] |= {"picture": "data:image/png;base64," + bodies[1]["picture"]}
    every = COUNT // len(wrong)
    mixed = [each for index, body in enumerate(wrong.values()) for each in (*bodies[index * every :][:every], body)]
    responses = ask(address, mixed)
    failed = responses[every :: every + 1]
    del responses[every :: every + 1]
    assert [response.json()["answer"] for response in responses] == [case.answer for case in cases]
    assert len({response.headers["replica"] for response in responses}) == REPLICAS
    assert max(int(response.headers["most"]) for response in responses) > len(POLICIES)
    for response, message in zip(failed, wrong, strict=True):
        assert response.status_code == 400 and message in response.text and "\n" not in response.text
    streamed = ask(address, [case.body(stream=True) for case in cases[: len(POLICIES)]])
    assert [response.text.strip() for response in streamed] == [case.answer for case in cases[: len(POLICIES)]]
    assert all(response.headers["transfer-encoding"] == "chunked" for response in streamed)
    (unread,) = ask(address, [wrong["base64"] | {"stream": True}])
    assert unread.status_code == 400


def test_a_stream_that_nobody_reads_on(served: Any, cases: list[Case], tmp_path: Path) -> None:
    """It stops, and what it held is free; another that waits for its turn never begins."""
    address, handle = served(folder=str(save(tmp_path, endless=True)), max_new_tokens=10**6)

    def held() -> Any:
        return handle.held.remote().result()

    before: list[int] = []
    for begun in (1, 2):
        with requests.post(address, json=cases[0].body(stream=True), stream=True, timeout=WAIT) as response:
            pieces = response.iter_content(None)
            assert cases[0].answer in next(pieces).decode() and next(pieces)
            with pytest.raises(requests.Timeout):
                requests.post(address, json=cases[1].body(stream=True), timeout=0.5)
            calls, caches, size = held()
            assert calls == begun and caches > 0
            assert not before or size > before[0]
        deadline = time.monotonic() + WAIT
        while held()[1] and time.monotonic() < deadline:
            time.sleep(0.05)
        calls, caches, size = held()
        assert calls == begun and caches == 0
        before.append(size)
    assert before[0] == before[1]


BROKEN = "broken.png"


@pytest.fixture
def table(cases: list[Case], tmp_path: Path) -> Path:
    """JSON lines, of pictures of which one is broken."""
    rows: list[dict[str, Any]] = []
    for index, case in enumerate(cases):
        rows.append({"picture": f"{index}.png", "question": case.question.text, "policy": case.policy})
        (tmp_path / rows[-1]["picture"]).write_bytes(case.picture)
    (tmp_path / BROKEN).write_bytes(cases[0].picture[:-5000])
    rows.insert(5, {"picture": BROKEN})
    path = tmp_path / "table.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_table(cluster: None, folder: Path, cases: list[Case], table: Path, tmp_path: Path) -> None:
    command = [str(folder), str(table), "--question", "?", "--actors", str(REPLICAS), "--max-new-tokens", "4"]
    load_example("batch_ray").main([*command, "--output", str(tmp_path / "answers")])
    rows = {
        Path(row["picture"]).name: row
        for file in (tmp_path / "answers").glob("*.json")
        for row in map(json.loads, file.read_text().splitlines())
    }
    broken = rows.pop(BROKEN)
    assert broken["answer"] is None and "cannot be read" in broken["error"] and broken["question"] == "?"
    assert [rows[f"{index}.png"]["answer"] for index in range(COUNT)] == [case.answer for case in cases]
    assert {row["error"] for row in rows.values()} == {None}
