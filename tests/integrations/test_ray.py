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
from http.client import HTTPConnection
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

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
    """Ray on this machine alone. It leaves nothing in the user's folders; sockets in its own need a short path."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            "local",
            num_cpus=6,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=2**27,
            log_to_driver=False,
            _temp_dir=place,
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def served(cluster: None) -> Iterator[Callable[..., tuple[str, Any]]]:
    """Runs the application of the example, with replicas that can be watched; returns its address and a handle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def run(name: str, **options: Any) -> tuple[str, Any]:
        example = load_example("serve_ray")
        example.Server = example.Server.options(func_or_class=watched(example))
        application = example.app(example.Options(**options))
        return f"http://127.0.0.1:{port}/{name}", serve.run(application, name=name, route_prefix=f"/{name}")

    yield run
    serve.shutdown()


def watched(example: ModuleType) -> type:
    class Server(example.Server.func_or_class):  # type: ignore[misc,name-defined]
        """Says which replica answers, how many it has answered at once, and what it does and holds."""

        def __init__(self, options: Any) -> None:
            super().__init__(options)
            self.most = self.waiting = self.begun = self.running = 0
            answer = self.answerer.answer

            def counted(asked: Any, **options: Any) -> Any:
                self.most, self.begun, self.running = max(self.most, len(asked)), self.begun + 1, self.running + 1
                try:
                    return answer(asked, **options)
                finally:
                    self.running -= 1

            self.answerer.answer = counted

        async def __call__(self, request: Any) -> Any:
            self.waiting += 1
            try:
                response = await super().__call__(request)
            finally:
                self.waiting -= 1
            response.headers.update({"replica": str(os.getpid()), "most": str(self.most)})
            return response

        async def now(self) -> dict[str, int]:
            """Without a collection of garbage: what is held by a cycle counts."""
            alive = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor | Cache)]
            storages = [each.untyped_storage() for each in alive if isinstance(each, torch.Tensor)]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            caches = sum(isinstance(each, Cache) for each in alive)
            counts = {name: getattr(self, name) for name in ("waiting", "begun", "running")}
            return counts | {"caches": caches, "bytes": sum(sizes.values())}

    return Server


def ask(address: str, bodies: list[dict[str, Any]]) -> list[requests.Response]:
    """All at a time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: requests.post(address, json=body, timeout=WAIT), bodies))


def test_many_requests_at_a_time(served: Any, folder: Path, cases: list[Case]) -> None:
    """Of mixed sizes and policies, in batches of two replicas; and some that fail alone."""
    address, _ = served("words", folder=str(folder), replicas=REPLICAS, max_new_tokens=4)
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
    """It stops, and what it held is free; another, given up while it waits for its turn, never begins."""
    address, handle = served("endless", folder=str(save(tmp_path, endless=True)), max_new_tokens=10**6)

    def wait_until(**expected: int) -> dict[str, int]:
        deadline = time.monotonic() + WAIT
        while not (now := handle.now.remote().result()).items() >= expected.items():
            assert time.monotonic() < deadline, f"{expected} never came; last were {now}"
            time.sleep(0.05)
        return now

    left = []
    for begun in (1, 2):
        with requests.post(address, json=cases[0].body(stream=True), stream=True, timeout=WAIT) as response:
            pieces = response.iter_content(None)
            assert cases[0].answer in next(pieces).decode() and next(pieces)
            other = HTTPConnection(urlsplit(address).netloc)
            other.request("POST", urlsplit(address).path, json.dumps(cases[1].body(stream=True)))
            wait_until(waiting=1)
            other.close()
            during = wait_until(waiting=0, begun=begun, running=1)
        left.append(wait_until(begun=begun, running=0))
        assert during["caches"] > left[-1]["caches"] == 0
        assert during["bytes"] > left[-1]["bytes"]
    assert left[0]["bytes"] == left[1]["bytes"]


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


def test_what_is_asked(tmp_path: Path) -> None:
    """Of a CSV, of JSON lines and of a folder."""
    example = load_example("batch_ray")
    policy = {"type": "TopK", "k": 1}
    (tmp_path / "table.csv").write_text("picture,question,policy\n1.png,first?,0.5\n2.png,,\n")
    lines = [{"picture": "1.png", "question": "first?", "policy": 0.5}, {"picture": str(tmp_path / "2.png")}]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = [
        {"picture": str(tmp_path / "1.png"), "question": "first?", "policy": "0.5"},
        {"picture": str(tmp_path / "2.png"), "question": "all?", "policy": json.dumps(policy)},
    ]
    for table in ("table.csv", "table.jsonl"):
        assert example.read_rows(tmp_path / table, "all?", json.dumps(policy)) == asked
    for name in ("1.png", "2.JPG"):
        (tmp_path / name).touch()
    assert example.read_rows(tmp_path, "all?", None) == [
        {"picture": str(tmp_path / name), "question": "all?", "policy": "null"} for name in ("1.png", "2.JPG")
    ]
