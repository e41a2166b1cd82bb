"""Measure a model on V* Bench, or other benchmarks of lmms-eval: low-res, with flexkit, and with all tokens.

    python examples/vstar_bench.py llava-hf/llava-1.5-7b-hf --preset training_free --dtype bfloat16
    python examples/vstar_bench.py senfu/llava-v1.5-7b-flexattn --dtype bfloat16
    accelerate launch --num_processes 8 examples/vstar_bench.py my/patched-model --tasks vstar_bench,textvqa_val

prints a table and writes it to ``scores.md`` and ``scores.csv`` in a folder, beside all questions and answers. The
model is a folder, or a name on the Hugging Face hub. Needs lmms-eval; docs/howto/evaluate.rst says how to install it.
"""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from flexkit.integrations.views import VIEWS

Scores = dict[tuple[str, str], str]
"""Of one view, by task and metric."""


def measure(view: str, options: argparse.Namespace, manager: TaskManager) -> Scores:
    """Run all tasks in one way; in all but the main process nothing comes of it."""
    given = {"pretrained": options.model, "view": view, "dtype": options.dtype, "preset": options.preset}
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None]
    begin = time.perf_counter()
    results = simple_evaluate(
        "flexkit",
        ",".join([*arguments, *options.model_args]),
        tasks=options.tasks.split(","),
        batch_size=options.batch_size,
        limit=options.limit,
        task_manager=manager,
        bootstrap_iters=0,
        cli_args=argparse.Namespace(output_path=str(options.output / view), process_with_media=False),
    )
    seconds = time.perf_counter() - begin
    scores: Scores = {}
    for task, samples in (results or {"samples": {}})["samples"].items():
        log(options.output / view / f"{task}.jsonl", samples)
        scores |= {(task, name): score for name, score in read(results["results"][task]).items()}
        scores[task, "questions"] = str(len(samples))
        lengths = [counts["input_tokens"] for sample in samples for counts in sample["token_counts"]]
        scores[task, "tokens of a prompt"] = f"{sum(lengths) / len(lengths):.0f}"
    return scores | {("all", "seconds"): f"{seconds:.0f}"}


def read(results: dict[str, Any]) -> dict[str, str]:
    """The scores among all that lmms-eval tells of a task; ``,none`` in their names is for no filter."""
    numbers = {name.removesuffix(",none"): score for name, score in results.items() if name.endswith(",none")}
    return {
        name: f"{score:.4g}"
        for name, score in numbers.items()
        if isinstance(score, int | float) and "stderr" not in name
    }


def log(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write what was asked and answered, a line for each question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(sample, default=str)}\n" for sample in samples))


def write(by_view: dict[str, Scores], folder: Path) -> str:
    """Write the table in two forms; returns the one that can be read."""
    lines = dict.fromkeys(line for scores in by_view.values() for line in scores)
    head = ["benchmark", "metric", *by_view]
    rows = [[*line, *(scores.get(line, "") for scores in by_view.values())] for line in lines]
    with (folder / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    table = "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])
    (folder / "scores.md").write_text(table)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in all ways, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--preset", help="how a base model is patched: training_free or published")
    parser.add_argument("--views", default=",".join(VIEWS), help="default: %(default)s")
    parser.add_argument("--tasks", default="vstar_bench", help="of lmms-eval; default: %(default)s")
    parser.add_argument("--include-path", help="a folder of more tasks")
    parser.add_argument("--dtype", help="default: that of the weights")
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="questions of each task; default: all")
    parser.add_argument("--output", type=Path, default=Path("scores"), help="a folder; default: %(default)s")
    parser.add_argument(
        "--model-args", nargs="*", default=[], metavar="NAME=VALUE", help="more of these, such as max_pixels=200704"
    )
    options = parser.parse_args(arguments)
    manager = TaskManager("WARNING", include_path=options.include_path, model_name="flexkit")
    by_view = {view: measure(view, options, manager) for view in options.views.split(",")}
    if Accelerator().is_main_process:
        print(write(by_view, options.output), end="")


if __name__ == "__main__":
    main()
