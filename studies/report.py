"""Tables and figures of the docs, from what the studies wrote.

python -m studies.report docs/evidence
"""

import argparse
import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from studies.motion.study import ALL as IN_SEQUENCE
from studies.native.study import ALL

# Okabe and Ito's colours, which people with any colour vision tell apart.
STYLES = {
    "oracle": ("#009E73", "^", "oracle: told where the digit is"),
    "attention map": ("#0072B2", "o", "the cells with most attention"),
    "threshold": ("#56B4E9", "s", "the cells above a threshold"),
    "random": ("#E69F00", "v", "cells at random"),
    "centre": ("#CC79A7", "D", "cells in the centre"),
}
PRESET = "always, gate 0.05, surer 1.0"
"""What ``training_free()`` says."""
TRADES = {
    "always": ("#0072B2", "o", "flexkit: own states of a tenth of the tokens"),
    "beside": ("#56B4E9", "s", "flexkit: beside the low-res tokens"),
    "best tile": ("#E69F00", "v", "best tile, asked again"),
}
WAYS = {
    "low_res": "low-res only",
    "flexkit": "flexkit: attention map, as trained",
    "topk": "flexkit: top 6 of 64 cells",
    "threshold": "flexkit: cells above 48/255",
    "top_p": "flexkit: half of the attention",
    "random": "6 cells at random",
    "center": "6 cells in the centre",
    "oracle": "6 cells around the digit (oracle)",
    "everything": "every high-res token",
    "all_in_sequence": "all high-res tokens in the sequence",
}


IN_DEPTH = {
    "low-res only": "low-res only",
    "always, gate 0.05, surer 1.0": "``training_free``",
    "always, gate 0.05, surer 3.0": "``training_free(surer=3)``",
    "always, gate 0.05, surer inf": "``training_free(surer=None)``",
    "always": "``training_free(gate=None, surer=None)``: always read",
    "always, oracle": "... cells around the digit (oracle)",
    "always, random": "... cells at random",
    "always, centre": "... cells in the centre",
    "beside, gate 0.05, surer 1.0": '``training_free(low_res_keys="keep")``: beside low-res tokens',
    "beside, gate 0.05, surer 3.0": "... ``surer=3``",
    "beside": "... always read",
    "beside, top 3": "... 3 cells in place of 6",
    "beside, each layer its own": "... ``select_layers=None``: each layer what its own map selects",
    "beside, oracle": "... cells around the digit (oracle)",
    "beside, random": "... cells at random",
    "features": '``training_free(high_res_states="features", gate=None)``',
    "best tile": "best tile, asked again",
    "best tile, gate 0.05, surer 1.0": "best tile, by the same rule",
}
"""Of the ways of ``studies.in_depth`` those that the table shows, and how one gets them."""


Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By track, then by way of looking, what ``flexkit eval`` measured."""


def scores_table(scores: Scores) -> list[list[str]]:
    """Rows of what ``flexkit eval`` printed: accuracies by track; cost of the first track."""
    first = next(iter(scores.values()))
    rows = [["", *scores, "read", "LM GFLOP"]]
    for way, name in WAYS.items():
        if way not in first:
            continue
        accuracies = [_share(track[way]["accuracy"]) for track in scores.values()]
        rows.append([name, *accuracies, _share(first[way]["selected_fraction"]), f"{first[way]['lm_gflops']:.3f}"])
    return rows


def again_table(scores: Scores, again: Mapping[str, Scores]) -> list[list[str]]:
    """Rows of other trainings' accuracies by track, and how many standard errors they are from the first's."""
    rows = [["", *(f"{track}, {name}" for track in scores for name in again)]]
    for way, name in WAYS.items():
        pairs = [(scores[track].get(way), other[track].get(way)) for track in scores for other in again.values()]
        rows.append([name, *(_compared(first, other) if first and other else "" for first, other in pairs)])
    return rows


def _compared(first: Mapping[str, float], other: Mapping[str, float]) -> str:
    counts = [score["questions"] for score in (first, other)]
    pooled = (first["accuracy"] * counts[0] + other["accuracy"] * counts[1]) / sum(counts)
    error = (pooled * (1 - pooled) * sum(1 / count for count in counts)) ** 0.5
    away = (other["accuracy"] - first["accuracy"]) / error if error else 0.0
    return f"{_share(other['accuracy'])} ({away:+.1f})"


def without_training_tables(bases: Mapping[str, Mapping[str, Any]]) -> dict[int, list[list[str]]]:
    """For each depth rows of means over its bases, with the standard error of the mean."""
    tables = {}
    for depth in sorted({base["layers"] for base in bases.values()}):
        group = [base["accuracy"] for base in bases.values() if base["layers"] == depth]
        kinds = list(group[0]["low-res only"])
        rows = [[way, *(_interval([of[way][kind] for of in group]) for kind in kinds)] for way in group[0]]
        tables[depth] = [["", *kinds], *rows]
    return tables


def in_depth_table(bases: Mapping[str, Mapping[str, Any]], kind: str) -> list[list[str]]:
    """Rows of means over the bases, with the standard error of the mean, for questions of one kind."""
    found = [base["accuracy"][kind] for base in bases.values()]
    abouts = list(found[0]["low-res only"])
    rows = [
        [name, *(_interval([of[way][about] for of in found]) for about in abouts)] for way, name in IN_DEPTH.items()
    ]
    return [["", *(f"{about}s" for about in abouts)], *rows]


def trained_table(ways: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """Rows of every way after so many steps."""
    found = {way: [of["accuracy"] | of["policies"] for of in bases.values()] for way, bases in ways.items()}
    rows = (([way, step], [of[step] for of in bases]) for way, bases in found.items() for step in bases[0])
    return _by_question(["", "steps"], rows)


def context_table(contexts: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of what tokens see on their way."""
    return _by_question([""], (([context], list(bases.values())) for context, bases in contexts.items()))


def _by_question(
    first: Sequence[str], rows: Iterable[tuple[Sequence[str], Sequence[Mapping[str, Mapping[str, float]]]]]
) -> list[list[str]]:
    """Means over the bases: by kind of question, then by what is asked, behind what heads and rows begin with."""
    found = list(rows)
    asked = [(kind, about) for kind, of in found[0][1][0].items() for about in of]
    return [
        [*first, *(f"{about}s, {kind}" for kind, about in asked)],
        *(
            [*labels, *(_interval([of[kind][about] for of in bases]) for kind, about in asked)]
            for labels, bases in found
        ),
    ]


def native_table(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of means over the models, with the standard error of the mean, and operations by those of all tokens."""
    found = list(models.values())
    abouts = list(found[0]["accuracy"][ALL])
    rows = []
    for way in found[0]["accuracy"]:
        accuracies = [_interval([of["accuracy"][way][about] for of in found]) for about in abouts]
        share = statistics.mean(of["lm_gflops"][way] / of["lm_gflops"][ALL] for of in found)
        rows.append([way, *accuracies, _share(share)])
    return [["", *(f"{about}s" for about in abouts), "LM FLOP"], *rows]


def motion_table(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of means over the models, with the standard error of the mean, and operations by those of all tokens."""
    ways, rows = list(models.values()), []
    for name in ways[0]:
        found = [of[name] for of in ways]
        accuracies = [_interval([of[track] for of in found]) for track in ("attribute", "low-res")]
        read, flops = (statistics.mean(of[key] for of in found) for key in ("read", "lm_gflops"))
        share = flops / statistics.mean(of[IN_SEQUENCE]["lm_gflops"] for of in ways)
        rows.append([name, *accuracies, _share(read), f"{flops:.3f}", _share(share)])
    return [["", "digits", "places and shapes", "read", "LM GFLOP", "LM FLOP"], *rows]


def pointing_table(bases: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of kinds of question: how often the peak of each layer's map is on the object, and of the mean map's."""
    found = [base["pointing"] for base in bases.values()]
    rows = [
        [layer, *(_interval([of[kind][layer] for of in found]) for kind in found[0])] for layer in found[0]["short"]
    ]
    return [["layer", *(f"{kind} questions" for kind in found[0])], *rows]


def trade_figure(bases: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What is read of digits against what is kept of places, one line for each way of looking closer."""
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    short, whole = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, kind, title in ((short, "short", "Asked in few words"), (whole, "whole", "Asked in whole questions")):
        _trade(axes, [base["accuracy"][kind] for base in bases.values()])
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlabel="rows and columns named rightly, %", ylim=(0, 102))
        axes.grid(alpha=0.3)
    short.set_ylabel("digits read rightly, %")
    whole.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.12))
    figure.suptitle(
        "Details read, and places kept: frozen pretrained models of 30 layers", x=0.01, ha="left", fontsize=11
    )
    return figure


def _trade(axes: Any, found: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    def point(way: str) -> tuple[float, float]:
        places = statistics.mean(of[way][about] for of in found for about in ("row", "column"))
        return 100 * places, 100 * statistics.mean(of[way]["digit"] for of in found)

    for way, (colour, marker, label) in TRADES.items():
        points = [point(f"{way}, gate 0.05, surer {surer}") for surer in ("0.5", "1.0", "2.0", "3.0", "5.0", "inf")]
        axes.plot(*zip(*points, point(way), strict=True), color=colour, marker=marker, label=label, linewidth=2)
    axes.plot(
        *point(PRESET),
        color="black",
        marker="o",
        fillstyle="none",
        markersize=12,
        linestyle="none",
        label="training_free()",
    )
    for way, label in (("beside, random", "cells at random"), ("low-res only", "low-res view only")):
        axes.plot(*point(way), color="grey", marker="o")
        axes.annotate(label, point(way), (-8, 0), textcoords="offset points", ha="right", va="center", color="grey")
    axes.axhline(10, color="grey", linestyle=":", linewidth=1)


def probe_table(bases: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of bases: the loss of the low-res view alone, and of the two layers that read best."""
    rows = [["base", "layers", "low-res only", "best layer", "its loss", "second-best layer", "its loss"]]
    for name, base in sorted(bases.items(), key=lambda item: item[1]["layers"]):
        losses = {layer: loss for layer, loss in base["losses"].items() if layer != "base"}
        best, second = sorted(losses, key=losses.__getitem__)[:2]
        found = [best, f"{losses[best]:.2f}", second, f"{losses[second]:.2f}"]
        rows.append([name, str(base["layers"]), f"{base['losses']['base']:.2f}", *found])
    return rows


def settings_table(settings: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> list[list[str]]:
    """Rows of means over the bases, with the standard error of the mean."""
    tracks = list(next(iter(settings.values()))[0])
    rows = [["", *tracks, "read"]]
    for name, bases in settings.items():
        accuracies = [_interval([base[track]["accuracy"] for base in bases]) for track in tracks]
        rows.append([name, *accuracies, _share(statistics.mean(base[tracks[0]]["fraction"] for base in bases))])
    return rows


def selection_figure(study: Mapping[str, Any]) -> Figure:
    """Accuracy against the fraction that was read, one line for each that selects."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    trainings = study["trainings"]
    for name, (colour, marker, label) in STYLES.items():
        amounts = list(trainings[0][name])
        fractions, means, errors = [], [], []
        for amount in amounts:
            accuracies = [training[name][amount]["accuracy"] for training in trainings]
            fractions.append(statistics.mean(training[name][amount]["fraction"] for training in trainings))
            means.append(statistics.mean(accuracies))
            errors.append(_error(accuracies))
        order = sorted(range(len(amounts)), key=fractions.__getitem__)
        axes.errorbar(
            [100 * fractions[i] for i in order],
            [100 * means[i] for i in order],
            yerr=[100 * errors[i] for i in order],
            color=colour,
            marker=marker,
            label=label,
            linewidth=2,
            capsize=3,
        )
    axes.axhline(10, color="grey", linestyle=":", linewidth=1)
    axes.set_title("Reading closer where the model itself looks: digits in drawn scenes", loc="left", fontsize=11)
    axes.annotate("guessing", (100, 10), xytext=(0, 4), textcoords="offset points", ha="right", color="grey")
    axes.set(xscale="log", xlabel="high-res tokens that a layer reads, % of all", ylabel="digits read rightly, %")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(
        frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.68), title="what a layer reads", alignment="left"
    )
    return figure


def _share(value: float) -> str:
    return f"{value:.3f}"


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _interval(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {_error(values):.3f}" if len(values) > 1 else "")


def _write(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _save(figure: Figure, path: Path) -> None:
    """Text as text, and the same file for the same numbers."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "flexkit"}):
        figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Write whatever there is a study of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the studies' JSON; gets tables and figures")
    folder = parser.parse_args(arguments).folder
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    if "scores" in found:
        _write(folder / "scores.csv", scores_table(found["scores"]))
    if "scores_again" in found:
        _write(folder / "scores_again.csv", again_table(found["scores"], found["scores_again"]))
    for name in {"without_training", "own_states", "two_words_in_depth"} & found.keys():
        for depth, rows in without_training_tables(found[name]["bases"]).items():
            _write(folder / f"{name}_{depth}.csv", rows)
    if "without_training" in found:
        _write(folder / "probe.csv", probe_table(found["without_training"]["bases"]))
    if "in_depth" in found:
        bases = found["in_depth"]["bases"]
        for kind in next(iter(bases.values()))["accuracy"]:
            _write(folder / f"in_depth_{kind}.csv", in_depth_table(bases, kind))
        _write(folder / "pointing.csv", pointing_table(bases))
        _save(trade_figure(bases), folder / "in_depth.svg")
    if "trained_in_depth" in found:
        _write(folder / "trained_in_depth.csv", trained_table(found["trained_in_depth"]["ways"]))
    if "own_context" in found:
        _write(folder / "own_context.csv", context_table(found["own_context"]["contexts"]))
    if "motion" in found:
        _write(folder / "motion.csv", motion_table(found["motion"]["models"]))
    if "native" in found:
        _write(folder / "native.csv", native_table(found["native"]["models"]))
    if "settings" in found:
        _write(folder / "settings.csv", settings_table(found["settings"]["settings"]))
    if "selection" in found:
        _save(selection_figure(found["selection"]), folder / "selection.svg")


if __name__ == "__main__":
    main()
