"""Small models and small files on which lmms-eval's own tasks run: drawn scenes, asked about as those benchmarks ask.

    python -m tests.integrations.scenes FOLDER

writes models into ``FOLDER/models`` and tasks into ``FOLDER/tasks``, for ``--include_path``.
"""

import base64
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lmms_eval.tasks
import numpy as np
import yaml
from PIL.Image import Image

import flexkit
from flexkit.visual_search import Question, draw_scene, load_model, questions
from flexkit.visual_search.choices import LETTERS, pose
from flexkit.visual_search.recipe import READS_CHOICES

_SEED = 4000
"""Of scenes that no model was trained on."""


def write_models(folder: Path) -> None:
    """``letters`` knows all tokens of a scene in the sequence; ``patched`` is the same model with a high-res view."""
    model, processor = load_model("letters_in_sequence")
    for name in ("letters", "patched"):
        if name == "patched":
            flexkit.patch_model(model, READS_CHOICES)
        model.half().save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def write_tasks(folder: Path, count: int) -> list[str]:
    """Write so many questions for each task, in files of the schema that its code reads; returns names of tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for (place, split), row in _TASKS.items():
        name = f"scenes_{Path(place).stem}"
        table = datasets.Dataset.from_list([row(index, *asked_about(index)) for index in range(count)])
        if isinstance(table[0].get("image"), dict):  # others are text, in base64
            table = table.cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{name}.parquet")
        task = {
            "include": str(Path(lmms_eval.tasks.__file__).parent / place),
            "task": name,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{name}.parquet")}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
        names.append(name)
    return names


def asked_about(index: int) -> tuple[Image, Question, dict[str, str], str]:
    """A scene, a question, an option under each letter, and the right letter."""
    scene = draw_scene([_SEED, index])
    known = questions(scene, "attribute")
    question = known[index % len(known)]
    choice = pose(np.random.default_rng([_SEED, index, 1]), question)
    return scene.image, question, dict(zip(LETTERS, choice.options, strict=True)), choice.letter


def _vstar(index: int, image: Image, question: Question, options: dict[str, str], right: str) -> dict[str, Any]:
    choices = " ".join(f"({letter}) {digit}" for letter, digit in options.items())
    return {
        "image": {"bytes": _png(image), "path": None},
        "text": f"{question.text} {choices}",
        "label": right,
        "category": "direct_attributes",
        "question_id": str(index),
    }


def _hrbench(index: int, image: Image, question: Question, options: dict[str, str], right: str) -> dict[str, Any]:
    return {
        "index": index,
        "question": question.text,
        "answer": right,
        "category": ("single", "cross")[index % 2],
        **options,
        "cycle_category": str(index % 4),
        "image": base64.b64encode(_png(image)).decode(),
    }


def _realworld(index: int, image: Image, question: Question, options: dict[str, str], right: str) -> dict[str, Any]:
    return {
        "index": str(index),
        "bytes": base64.b64encode(_png(image)).decode(),
        "question": question.text,
        "multi-choice options": [f"({letter}) {digit}" for letter, digit in options.items()],
        "answer": right,
        "category": "Perception/OCR with Complex Context",
        "l2-category": "digits",
    }


def _textvqa(index: int, image: Image, question: Question, *_: Any) -> dict[str, Any]:
    return {
        "image": {"bytes": _png(image), "path": None},
        "question": question.text,
        "answers": [question.answer] * 10,
        "question_id": index,
        "ocr_tokens": ["none"],
    }


_TASKS: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
    ("vstar_bench/vstar_bench.yaml", "test"): _vstar,
    ("hrbench/hrbench4k.yaml", "hrbench_4k"): _hrbench,
    ("mme_realworld/mme_realworld_lite.yaml", "train"): _realworld,
    ("textvqa/textvqa_val.yaml", "validation"): _textvqa,
}
"""Of lmms-eval's, by file and split."""


def _png(image: Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    write_models(Path(sys.argv[1]) / "models")
    print(*write_tasks(Path(sys.argv[1]) / "tasks", count=100), sep="\n")
