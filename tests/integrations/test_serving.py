"""`transformers serve` of a saved folder, asked as any server is; `make test-engines` installs what this needs."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
import openai

from flexkit.visual_search import draw_scene, load_model, questions

COUNT = 20
SCENES = [draw_scene(seed, 600) for seed in range(100, 100 + COUNT)]
ASKED = [next(asked for asked in questions(scene, "attribute") if asked.about == "digit") for scene in SCENES]
GUESSED = 10
"""Of 20 answers, one of 8 digits each, that are guessed 10 are right in less than one of 10,000 runs."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in half precision, as most are served: servers hand on pictures of single precision."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = load_model()
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Any]:
    """A client of a server of a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", *command], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        while process.poll() is None:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.2)
        assert process.poll() is None
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        process.terminate()
        process.wait()


def answers(client: Any, model: Path, *, stream: bool = False) -> list[str]:
    """What is said about each scene, two clients at a time."""

    def ask(index: int) -> str:
        file = io.BytesIO()
        SCENES[index].image.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        turn = {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ASKED[index].text}],
        }
        said = client.chat.completions.create(
            model=str(model), messages=[turn], max_tokens=2, temperature=0, stream=stream
        )
        if stream:
            return "".join(part.choices[0].delta.content or "" for part in said if part.choices).strip()
        return str(said.choices[0].message.content).strip()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(ask, range(COUNT)))


def right(said: list[str]) -> int:
    return sum(one == asked.answer for one, asked in zip(said, ASKED, strict=True))


def test_a_server_reads_both_views(saved: Path) -> None:
    with served(saved, "--trust-remote-code") as client:
        said = answers(client, saved)
        assert right(said) == COUNT
        assert answers(client, saved, stream=True) == said


def test_without_remote_code_a_server_has_the_base_model(saved: Path) -> None:
    with served(saved, "--dtype", "float32") as client:
        assert right(answers(client, saved)) < GUESSED
