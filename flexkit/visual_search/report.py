"""Scores for people to read."""

from collections.abc import Mapping
from typing import Any

__all__ = ["table"]


def table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Scores as a table of text.

    Parameters
    ----------
    scores : mapping
        What :func:`flexkit.visual_search.evaluation.evaluate` returns.

    Examples
    --------
    >>> score = {"accuracy": 0.5, "questions": 4, "selected_fraction": 0.1, "lm_gflops": 0.06, "seconds": 0.01}
    >>> print(table({"attribute": {"topk": score}}))
    attribute (4 questions)     accuracy  selected  LM GFLOP   seconds
      topk                          .500      .100     0.060    0.0100
    """
    lines = []
    for track, ways in scores.items():
        count = next(iter(ways.values()))["questions"]
        lines.append(
            f"{f'{track} ({count} questions)':<26}{'accuracy':>10}{'selected':>10}{'LM GFLOP':>10}{'seconds':>10}"
        )
        for name, way in ways.items():
            accuracy, selected = (f"{way[key]:.3f}".lstrip("0") for key in ("accuracy", "selected_fraction"))
            lines.append(f"  {name:<24}{accuracy:>10}{selected:>10}{way['lm_gflops']:>10.3f}{way['seconds']:>10.4f}")
    return "\n".join(lines)
