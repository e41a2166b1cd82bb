"""The demo: ask about a picture, show where the model looked and what that cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from flexkit.demo.ask import ask
from flexkit.demo.cost import Cost, measure
from flexkit.demo.figure import draw_figure
from flexkit.demo.picture import read_picture
from flexkit.demo.question import check_question
from flexkit.demo.report import ALL, FLEXKIT, INTRODUCTION, LOW_RES, cost_report, looking_report
from flexkit.demo.task import Task, draw_task
from flexkit.demo.ways import all_in_sequence, low_res_only, with_flexkit
from flexkit.errors import ConfigError

__all__ = ["FIGURE", "run"]

FIGURE = "where-it-looked.png"
"""Name of the file that the demo writes."""


def run(
    image: Path | None = None,
    question: str | None = None,
    output: Path = Path("flexkit-demo"),
    new_tokens: int = 8,
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
    new_tokens : int
        Length of the answer.
    seed : int
        Of the weights and of the drawn picture.

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
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
    print(INTRODUCTION)
    source = "drawn" if image is None else str(image)
    print(f"Picture   {source}, {task.image.width} x {task.image.height} pixels")
    print(f"Question  {' '.join(task.question.split())}", flush=True)
    with _one_thread():
        answer = ask(task.image, task.question, new_tokens, seed)
        told = repr(answer.text) + (f"  (true: {task.answer!r})" if task.answer else "")
        print(f"Answer    {told}\n")
        heading = (f"Asked: {task.question}", f"Answered: {told}, from untrained weights: noise")
        figure = draw_figure(task.image, answer, heading=heading, box=task.box)
        with _writing(output):
            figure.save(output / FIGURE)
        print(looking_report(answer, output / FIGURE), flush=True)
        ways = {LOW_RES: low_res_only, FLEXKIT: with_flexkit, ALL: all_in_sequence}
        costs = measure({name: partial(way, answer.model, answer.inputs, new_tokens) for name, way in ways.items()})
    print(cost_report(answer, costs, new_tokens))
    return costs


def _task(image: Path | None, question: str | None, seed: int) -> Task:
    if question is not None:
        check_question(question)
    task = draw_task(seed) if image is None else Task(read_picture(image), "What is in this picture?")
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


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be written: {error}") from error
