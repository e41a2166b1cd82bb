"""The demo: ask about a picture, show where the model looked and what that cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from flexkit.demo.ask import Asked, ask
from flexkit.demo.cost import Cost, measure
from flexkit.demo.figure import draw_figure
from flexkit.demo.picture import read_picture
from flexkit.demo.question import check_question
from flexkit.demo.report import INTRODUCTION, answer_report, cost_report, looking_report
from flexkit.demo.task import Task, draw_task
from flexkit.visual_search import load_model
from flexkit.visual_search.ways import Way
from flexkit.writing import writing

__all__ = ["FIGURE", "run"]

FIGURE = "where-it-looked.png"
"""Name of the file that the demo writes."""

LOW_RES, FLEXKIT, ALL = "low-res view only", "flexkit", "all tiles in the sequence"
_ASKED = "In which row is the object that is red?"
"""What is asked about a picture, unless something else is."""


def run(
    image: Path | None = None,
    question: str | None = None,
    output: Path = Path("flexkit-demo"),
    seed: int = 0,
) -> dict[str, Cost]:
    """Run the demo and print its report.

    Parameters
    ----------
    image : pathlib.Path, optional
        A picture; by default one is drawn.
    question : str, optional
        About the picture.
    output : pathlib.Path
        Folder for the figure; made if there is none.
    seed : int
        Of the drawn picture.

    Returns
    -------
    dict of str to Cost
        For each way of answering.

    Raises
    ------
    HighResInputError
        If the picture cannot be read.
    ConfigError
        If the question cannot be asked, or the folder cannot be written.
    """
    task = _task(image, question, seed)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    print(INTRODUCTION)
    source = "drawn" if image is None else str(image)
    print(f"Picture   {source}, {task.image.width} x {task.image.height} pixels")
    print(f"Question  {' '.join(task.question.split())}", flush=True)
    with _one_thread():
        base, tuned = (Way(*load_model(stage)) for stage in ("base", "tuned"))
        low_res, flexkit = (Asked.of(way, task.image, task.question) for way in (base, tuned))
        answer = ask(flexkit)
        answers = {LOW_RES: low_res.text(), FLEXKIT: answer.text}
        print(f"{answer_report(answers, task.answer, _unknown(base, task.question))}\n")
        told = f"Answered: {answer.text}" + (f" (true: {task.answer})" if task.answer else "")
        figure = draw_figure(task.image, answer, heading=(f"Asked: {task.question}", told), box=task.box)
        with writing(output):
            figure.save(output / FIGURE)
        print(looking_report(answer, output / FIGURE), flush=True)
        everything = Asked.of(replace(base, in_sequence=True), task.image, task.question)
        ways = {LOW_RES: low_res, FLEXKIT: flexkit, ALL: everything}
        costs = measure({name: asked.generate for name, asked in ways.items()})
    tokens = {name: str(asked.image_tokens) for name, asked in ways.items()}
    tokens[FLEXKIT] += f" + {max(answer.read_tokens.values())} read"
    print(cost_report(answer, costs, tokens))
    return costs


def _unknown(way: Way, question: str) -> list[str]:
    tokenizer = way.processor.tokenizer
    return [word for word in question.split() if tokenizer.unk_token_id in tokenizer(word).input_ids]


def _task(image: Path | None, question: str | None, seed: int) -> Task:
    if question is not None:
        check_question(question)
    task = draw_task(seed) if image is None else Task(read_picture(image), _ASKED)
    return task if question in (None, task.question) else Task(task.image, str(question))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Times on one thread can be compared on a machine that others use too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
