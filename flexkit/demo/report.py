"""What the demo prints, for people who meet flexkit for the first time."""

from collections.abc import Collection, Mapping
from pathlib import Path
from textwrap import fill

from flexkit.demo.ask import Answer
from flexkit.demo.cost import Cost

__all__ = ["INTRODUCTION", "answer_report", "cost_report", "cost_table", "looking_report"]


def answer_report(answers: Mapping[str, str], truth: str | None, unknown: Collection[str] = ()) -> str:
    """What each way answered.

    Parameters
    ----------
    answers : dict of str to str
        By the name of the way.
    truth : str, optional
        The true answer, if it is known.
    unknown : collection of str
        Words of the question that the model does not know.

    Examples
    --------
    >>> print(answer_report({"plain": "3", "flexkit": "7"}, "7"))
    Answers   plain                     3      wrong
              flexkit                   7      right
    """
    verdicts = {name: "" if truth is None else "right" if text == truth else "wrong" for name, text in answers.items()}
    lines = [f"          {name:<26}{text:<7}{verdicts[name]}".rstrip() for name, text in answers.items()]
    report = "\n".join(["Answers   " + lines[0].lstrip(), *lines[1:]])
    if unknown:
        words = ", ".join(dict.fromkeys(unknown))
        report += f"\n\n{_paragraph(f'The model was never taught these words, and read past them: {words}.')}"
    return report


def cost_table(costs: Mapping[str, Cost], image_tokens: Mapping[str, str]) -> str:
    """One row for each way of answering.

    Parameters
    ----------
    costs : dict of str to Cost
        By the name of the way.
    image_tokens : dict of str to str
        What each way has of the picture.

    Examples
    --------
    >>> print(cost_table({"plain": Cost(2_500_000_000, 0.25, 3 << 20)}, {"plain": "144"}))
                                    image tokens     GFLOP   seconds  kept MiB
      plain                                  144      2.50     0.250      3.00
    """
    header = f"  {'':<26}{'image tokens':>16}{'GFLOP':>10}{'seconds':>10}{'kept MiB':>10}"
    rows = [
        f"  {name:<26}{image_tokens[name]:>16}"
        f"{cost.flops / 1e9:>10.2f}{cost.seconds:>10.3f}{cost.kept_bytes / 2**20:>10.2f}"
        for name, cost in costs.items()
    ]
    return "\n".join([header, *rows])


def looking_report(answer: Answer, figure: Path) -> str:
    """Where the layers looked, in words.

    Parameters
    ----------
    answer : Answer
        What came of the question.
    figure : pathlib.Path
        Where it is drawn.
    """
    read = ", ".join(f"layer {layer} read {count}" for layer, count in answer.read_tokens.items())
    text = (
        f"Of {answer.high_res_tokens} high-res tokens {read}: those where the layer before had looked. "
        f"{answer.tiles[0]} of {answer.tiles[1]} tiles were encoded for that."
    )
    return f"Where it looked: {figure}\n\n{_paragraph(text)}\n"


def cost_report(answer: Answer, costs: Mapping[str, Cost], image_tokens: Mapping[str, str]) -> str:
    """The table of costs and how to read it.

    Parameters
    ----------
    answer : Answer
        What came of the question.
    costs : dict of str to Cost
        By the name of the way.
    image_tokens : dict of str to str
        What each way has of the picture.
    """
    text = (
        f"For {answer.asked.text_tokens} tokens of text and 2 of answer. GFLOP: all matrix products, those of the "
        "vision tower included; flexkit has it encode the tiles that are looked at. Seconds: on one CPU thread, median "
        "of three runs in turns; in a model as small as this one, they are overheads. Kept MiB: what stays from token "
        "to token, the KV cache and, for flexkit, the high-res features of those tiles, and keys and values of what "
        "was read."
    )
    return f"What it cost:\n\n{cost_table(costs, image_tokens)}\n\n{_paragraph(text)}"


def _paragraph(text: str) -> str:
    return fill(text, width=88, initial_indent="  ", subsequent_indent="  ")


INTRODUCTION = (
    "flexkit demo: a small LLaVA that reads a second, high-res view only where it looks.\n\n"
    + _paragraph(
        "It was trained on drawn scenes like this one, and knows nothing else: it names the digit, the shape, the row "
        "or the column of the one object of a colour. Of a photograph it will name colours at best."
    )
    + "\n"
)
"""What the small model can do."""
