"""lmms-eval's own tasks, on small models and drawn scenes; `make test-engines` installs what this needs."""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks.hrbench.hrbench_evals import HRBenchEval

from flexkit.errors import ConfigError, HighResInputError, UnsupportedModelError
from flexkit.integrations.lmms_eval import FlexkitModel
from flexkit.visual_search.choices import LETTERS
from tests.integrations import scenes
from tests.scripts import load_example

COUNT = 48
"""Questions of each task. A letter that is guessed is right for 12 of them, and with four standard deviations for 24.
The model names nine letters in ten, of 48 with four deviations 34, and behind long instructions three in four: 24."""
GUESSED = 24 / COUNT
VSTAR, HRBENCH, REALWORLD, TEXTVQA = (
    f"scenes_{name}" for name in ("vstar_bench", "hrbench4k", "mme_realworld_lite", "textvqa_val")
)
METRICS = {VSTAR: "vstar_overall_acc", HRBENCH: "average", REALWORLD: "mme_realworld_score", TEXTVQA: "exact_match"}
READ = {VSTAR: 34 / COUNT, HRBENCH: 34 / COUNT, REALWORLD: 24 / COUNT, TEXTVQA: 40 / COUNT}
LAUNCHER = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
READING = ("zoom=3", "gate=null", "surer=null", "high_res_states=features", "queries=all", "share_selection=false")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def judged() -> Iterator[list[Any]]:
    """What was sent to a remote judge, which HR-Bench asks about answers without a letter."""
    sent: list[Any] = []

    def send(self: Any, payload: Any) -> Any:
        sent.append(payload)
        return {"choices": [{"message": {"content": "Z"}}]}

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(HRBenchEval, "_post_request", send)
        yield sent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("scenes")
    scenes.write_models(root / "models")
    scenes.write_tasks(root / "tasks", COUNT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(root / "datasets"))
        monkeypatch.chdir(root)  # lmms-eval writes logs where it is
        yield root


@pytest.fixture(scope="module")
def manager(folder: Path) -> TaskManager:
    return TaskManager("ERROR", include_path=str(folder / "tasks"), model_name="flexkit")


@pytest.fixture(scope="module")
def run(folder: Path, manager: TaskManager) -> Run:
    def evaluate(model: str, task: str = VSTAR, batch_size: int = 8, **arguments: Any) -> dict[str, Any]:
        given = {"pretrained": folder / "models" / model, "dtype": "float32", **arguments}
        results = simple_evaluate(
            "flexkit",
            ",".join(f"{name}={value}" for name, value in given.items()),
            tasks=[task],
            batch_size=batch_size,
            task_manager=manager,
            bootstrap_iters=0,
            cli_args=argparse.Namespace(output_path=str(folder / "out"), process_with_media=False),
        )
        assert results is not None
        return dict(results)

    return evaluate


def answers(results: dict[str, Any], task: str = VSTAR) -> list[str]:
    """In the order of the questions; lmms-eval's own log has the text in place of a list of one."""
    samples = sorted(results["samples"][task], key=lambda each: each["doc_id"])
    return ["".join(sample["filtered_resps"]) for sample in samples]


def score(results: dict[str, Any], task: str = VSTAR) -> float:
    """A share; V* Bench gives per cent."""
    found = float(results["results"][task][f"{METRICS[task]},none"])
    return found / 100 if task == VSTAR else found


def test_lmms_eval_finds_the_model() -> None:
    assert get_model("flexkit") is FlexkitModel


@pytest.fixture(scope="module")
def table(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """What the example writes of all tasks that ask for letters."""
    load_example("vstar_bench").main(
        [
            str(folder / "models" / "letters"),
            *("--preset", "training_free", "--dtype", "float32", "--batch-size", "8"),
            *("--include-path", str(folder / "tasks"), "--tasks", f"{VSTAR},{HRBENCH},{REALWORLD}"),
            *("--output", str(folder / "table"), "--model-args", *READING),
        ]
    )
    with (folder / "table" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        (row["benchmark"], row["metric"]): {view: float(row[view]) for view in ("low", "flexkit", "all")}
        for row in rows
    }


@pytest.mark.parametrize("task", [VSTAR, HRBENCH, REALWORLD])
def test_what_low_res_loses_is_read(task: str, table: Any, judged: list[Any]) -> None:
    per_cent = 100 if task == VSTAR else 1
    shares = {view: found / per_cent for view, found in table[task, METRICS[task]].items()}
    assert shares["low"] <= GUESSED and min(shares["flexkit"], shares["all"]) >= READ[task]
    assert set(table[task, "questions"].values()) == {COUNT}
    tokens = table[task, "tokens of a prompt"]
    assert tokens["low"] == tokens["flexkit"] == tokens["all"] - 9 * 64
    assert judged == []


def test_the_table_can_be_read(table: Any, folder: Path) -> None:
    head, line, *rows = (folder / "table" / "scores.md").read_text().splitlines()
    assert head == "| benchmark | metric | low | flexkit | all |" and set(line) == set("|- ")
    assert len(rows) == len(table) and all(row.count("|") == 6 for row in rows)
    sample = json.loads((folder / "table" / "all" / f"{VSTAR}.jsonl").read_text().splitlines()[0])
    said, letter = sample["filtered_resps"][0].split()
    assert said.isdigit() and letter in LETTERS


def test_a_single_word_or_phrase(run: Run) -> None:
    low, everything = (run("letters", TEXTVQA, preset="none", zoom=3, view=view) for view in ("low", "all"))
    assert score(low, TEXTVQA) <= 0.5 and score(everything, TEXTVQA) >= READ[TEXTVQA]
    assert set("".join(answers(everything, TEXTVQA))) <= set("0123456789")


@pytest.fixture(scope="module")
def alone(run: Run) -> dict[str, Any]:
    return run("patched")


def test_a_saved_patched_model(run: Run, alone: dict[str, Any]) -> None:
    low = run("patched", view="low")
    assert score(low) <= GUESSED and score(alone) >= READ[VSTAR]
    nothing = run("patched", policy='{"type":"Nothing"}')
    assert answers(nothing) == answers(low)


def test_batches_are_no_different(run: Run, alone: dict[str, Any]) -> None:
    assert answers(run("patched", batch_size=1)) == answers(alone)


def test_two_processes_are_as_good_as_one(folder: Path, alone: dict[str, Any]) -> None:
    command = [
        *(sys.executable, "-m", *LAUNCHER, "-m", "lmms_eval", "--model", "flexkit"),
        *("--model_args", f"pretrained={folder / 'models' / 'patched'},dtype=float32", "--batch_size", "8"),
        *("--include_path", str(folder / "tasks"), "--tasks", VSTAR),
        *("--output_path", str(folder / "two"), "--log_samples"),
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert "Running on rank 1" in done.stdout + done.stderr
    (path,) = (folder / "two").rglob("*_results.json") or pytest.fail(done.stderr[-4000:] + done.stdout[-4000:])
    results = json.loads(path.read_text())["results"][VSTAR]
    assert results["vstar_overall_acc,none"] == alone["results"][VSTAR]["vstar_overall_acc,none"]
    (path,) = (folder / "two").rglob("*_samples_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert answers({"samples": {VSTAR: samples}}) == answers(alone)


@pytest.fixture(scope="module")
def model(folder: Path) -> FlexkitModel:
    return FlexkitModel(str(folder / "models" / "patched"), dtype="float32")


def request(model: FlexkitModel, content: list[dict[str, Any]], **kwargs: Any) -> Instance:
    model.task_dict = {"task": {"test": [{}]}}
    arguments = "a question", lambda doc: [{"role": "user", "content": content}], kwargs, 0, "task", "test"
    return Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})


def asked(model: FlexkitModel, **kwargs: Any) -> str:
    image, question, options, _ = scenes.asked_about(0)
    listed = " ".join(f"({letter}) {digit}" for letter, digit in options.items())
    content = [{"type": "image", "url": image}, {"type": "text", "text": f"{question.text} {listed}"}]
    (found,) = model.generate_until([request(model, content, **kwargs)])
    return str(found.text)


def test_what_a_task_says_of_generation(model: FlexkitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    generate = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **kwargs: given.append(kwargs) or generate(**kwargs))
    answer = asked(model, max_new_tokens=16, temperature=0.0, top_p=1.0, do_sample=False, until=["\n\n"])
    assert answer.split()[-1] in LETTERS and not given[-1]["do_sample"] and given[-1]["top_p"] is None
    assert (
        asked(model, until=answer) == "" and asked(model, until=["\n\n", "no such"], image_aspect_ratio="x") == answer
    )
    assert given[-1]["max_new_tokens"] == 1024 and "image_aspect_ratio" not in given[-1]
    asked(model, temperature=0.5, max_new_tokens=2)
    assert given[-1]["do_sample"] and given[-1]["temperature"] == 0.5


def test_what_is_said_around_a_question(folder: Path) -> None:
    model = FlexkitModel(
        str(folder / "models" / "letters"), "none", dtype="float32", system_prompt="Look.", prompt_suffix="\\nBriefly."
    )
    system, user = model._conversation([{"role": "user", "content": [{"type": "text", "text": "What?"}]}])
    assert system["content"] == [{"type": "text", "text": "Look."}]
    assert user["content"] == [{"type": "text", "text": "What?\nBriefly."}]


def test_an_error_ends_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other models of lmms-eval count an empty answer for it."""

    def fail(self: Any, *_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FlexkitModel, "_options", fail)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        run("patched")
    assert re.fullmatch(rf"flexkit was answering {VSTAR} \d+(, {VSTAR} \d+){{7}}\.", *caught.value.__notes__)


def test_what_is_refused(model: FlexkitModel, folder: Path) -> None:
    with pytest.raises(NotImplementedError, match="no log-likelihoods"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
    for kind in ("video", "audio"):
        with pytest.raises(HighResInputError, match="flexkit reads pictures, and this task has"):
            model.generate_until([request(model, [{"type": kind, "url": "file"}])])
    name = str(folder / "models" / "letters")
    with pytest.raises(ConfigError, match=r"policy is no JSON: \{TopK\}"):
        FlexkitModel(name, "training_free", policy="{TopK}")
    with pytest.raises(ConfigError, match="view 'flexkit' of a model that is not patched has no zoom"):
        FlexkitModel(name, "none", view="flexkit")
    with pytest.raises(UnsupportedModelError, match="max_pixels bounds pictures of any size"):
        FlexkitModel(name, "none", max_pixels=1000)
    with pytest.raises(ConfigError, match="unknown settings"):
        FlexkitModel(name, "training_free", zooom=3)
