"""What the demo prints, for people who meet flexkit for the first time."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

from flexkit.demo.ask import SHARE, Answer
from flexkit.demo.cost import Cost

__all__ = ["ALL", "FLEXKIT", "INTRODUCTION", "LOW_RES", "cost_report", "cost_table", "looking_report"]

LOW_RES, FLEXKIT, ALL = "low-res view only", "flexkit", "all in the sequence"


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
      plain                           144       2.5      0.25       3.0
    """
    header = f"  {'':<19}{'image tokens':>16}{'GFLOP':>10}{'seconds':>10}{'kept MiB':>10}"
    rows = [
        f"  {name:<19}{image_tokens[name]:>16}"
        f"{cost.flops / 1e9:>10.1f}{cost.seconds:>10.2f}{cost.kept_bytes / 2**20:>10.1f}"
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
    layers = list(answer.layers)
    text = (
        f"Layers {layers[0]} to {layers[-1]} each read {answer.read_tokens} of {answer.high_res_tokens} high-res "
        f"tokens, in the {SHARE:.0%} of the low-res cells that got most attention in the layer before. That is "
        f"the policy TopK({SHARE}); the paper's threshold waits for trained weights."
    )
    return f"Where it looked: {figure}\n\n{_paragraph(text)}\n"


def cost_report(answer: Answer, costs: Mapping[str, Cost], new_tokens: int) -> str:
    """The table of costs and how to read it.

    Parameters
    ----------
    answer : Answer
        What came of the question.
    costs : dict of str to Cost
        Of the three ways.
    new_tokens : int
        Length of the answer.
    """
    low_res, high_res = answer.low_res_tokens, answer.high_res_tokens
    tokens = {
        LOW_RES: str(low_res),
        FLEXKIT: f"{low_res} + {answer.read_tokens} read",
        ALL: str(low_res + high_res),
    }
    text = (
        f"For {answer.prompt_tokens - low_res} tokens of text and {new_tokens} of answer. GFLOP: all matrix "
        "products, those of the vision tower included. Seconds: on one CPU thread, median of three runs in "
        "turns. Kept MiB: what stays from token to token, the KV cache and, for flexkit, the high-res features "
        "with their keys and values."
    )
    return f"What it cost:\n\n{cost_table(costs, tokens)}\n\n{_paragraph(text)}"


def _paragraph(text: str) -> str:
    return fill(text, width=88, initial_indent="  ", subsequent_indent="  ")


INTRODUCTION = (
    "flexkit demo: a small LLaVA that reads a second, high-res view only where it looks.\n\n"
    + _paragraph(
        "Its weights are untrained: the answer is noise, and so is where it looks. What is real is how it reads, "
        "and what that costs."
    )
    + "\n"
)
