"""Tables and figure of the docs' page on benchmarks, from what the benchmarks wrote.

python -m benchmarks.page benchmarks/results docs/benchmarks
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LAUNCHED = {
    "steady": "selection stays",
    "top_k": "``TopK(0.1)``, all projected",
    "threshold": "``FlexConfig()``",
    "one_selection": "``training_free``, always read",
}
Results = Mapping[str, Mapping[str, Any]]
"""By the name of the file."""


def facts_table(results: Results) -> list[list[str]]:
    """What every number was measured on."""
    rows = [["result", "command", "device", "threads", "dtype", "batch", "torch", "transformers"]]
    for name, found in results.items():
        versions = found["versions"]
        measured = [str(found[key]) for key in ("command", "device", "threads", "dtype", "batch")]
        rows.append([name, *measured, versions["torch"], versions["transformers"]])
    return rows


def speed_table(results: Results) -> list[list[str]]:
    """Rows of language models: seconds by those of the base model, and all tokens in the sequence by flexkit's."""
    rows = [
        [
            "language model",
            "prefill",
            "prefill, recompute",
            "token",
            "token, other cells each time",
            "token, recompute",
            "all tokens: prefill",
            "all tokens: token",
        ]
    ]
    for found in results.values():
        prefill, decode = found["ratios"]["prefill"], found["ratios"]["decode"]
        shares = [prefill["flexkit"], prefill["recompute"]]
        shares += [decode[way] for way in ("flexkit", "flexkit_moving", "recompute")]
        shares += [found["ratios"][f"{part}_of_all"]["all_in_sequence"] for part in ("prefill", "decode")]
        rows.append([shape(found), *(f"{share:.2f}" for share in shares)])
    return rows


def own_states_table(results: Results) -> list[list[str]]:
    """Rows of language models and ways without training: seconds by those of the base model, and a prefill's MiB."""
    ways = {"own_states": LAUNCHED["one_selection"], "best_tile": "crop and ask again"}
    rows = [["language model", "", "prefill", "token", "prefill, MiB"]]
    for found in results.values():
        for way, name in ways.items():
            shares = (f"{found['ratios'][part][way]:.2f}" for part in ("prefill", "decode"))
            rows.append([shape(found), name, *shares, f"{found['peak_mib'][way]:.0f}"])
    return rows


def memory_table(results: Results) -> list[list[str]]:
    """Rows of language models: what a prefill takes up at most, beyond the weights, in MiB."""
    ways = {
        "base": "low-res view only",
        "flexkit": "flexkit",
        "recompute": "recompute",
        "all_in_sequence": "all high-res tokens in the sequence",
    }
    rows = [["language model", *ways.values()]]
    for found in results.values():
        rows.append([shape(found), *(f"{found['peak_mib'][way]:.0f}" for way in ways)])
    return rows


def launches_table(results: Results) -> list[list[str]]:
    """Rows of models, cases and ways: kernels and bytes by the base model's, and waits of the host."""
    parts = ("prefill", "token")
    rows = [["model", "prompt", "", *(f"{part}: {what}" for part in parts for what in ("kernels", "bytes", "waits"))]]
    for found in results.values():
        for case, ways in found["launches"].items():
            base = ways["base"]
            for way, counted in ways.items():
                cells = [cell for part in parts for cell in _by_base(counted[part], base[part])]
                if way != "base":
                    rows.append([found["family"], case, LAUNCHED[way], *cells])
    return rows


def answers_table(results: Results) -> list[list[str]]:
    """Rows of models and ways: the same for all tokens of a long answer."""
    rows = [["model", "", "kernels", "bytes", "waits"]]
    for found in results.values():
        ways = next(iter(found["launches"].values()))
        for way, counted in ways.items():
            if way != "base":
                rows.append([found["family"], LAUNCHED[way], *_by_base(counted["answer"], ways["base"]["answer"])])
    return rows


def _by_base(counted: Mapping[str, int], base: Mapping[str, int]) -> list[str]:
    return [*(f"{counted[what] / base[what]:.2f}" for what in ("kernels", "bytes")), str(counted["waits"])]


def shape(found: Mapping[str, Any]) -> str:
    """A language model in few words."""
    model = found["language_model"]
    heads = f"{model['heads']} heads"
    if model["key_heads"] != model["heads"]:
        heads += f", {model['key_heads']} for keys"
    return f"{model['layers']} layers of width {model['width']}, {heads}"


def compiled_table(results: Results) -> list[list[str]]:
    """Rows of language models: seconds of a compiled token by those of the base model's."""
    ways = ("top_k", "one_selection")
    rows = [["language model", *(LAUNCHED[way] for way in ways)]]
    for found in results.values():
        rows.append([shape(found), *(f"{found['ratios'][way]:.2f}" for way in ways)])
    return rows


def growth_table(ways: Mapping[str, Mapping[str, Any]], first: str) -> list[list[str]]:
    """Rows of sizes, or of fractions."""
    rows = [[first, "prefill", "token", "LM GFLOP", "kept MiB", "tiles encoded"]]
    for name, way in ways.items():
        tiles = "-" if way["tiles"] is None else str(way["tiles"])
        costs = [f"{way['prefill']:.2f}", f"{way['decode']:.2f}", f"{way['lm_gflops']:.4g}", f"{way['kept_mib']:.1f}"]
        rows.append([name, *costs, tiles])
    return rows


def training_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of ways of training."""
    names = {
        "base": "base model, low-res view only",
        "flexkit": "flexkit, all weights but the tower's",
        "flexkit_added": "flexkit, only the added projections",
        "all_in_sequence": "all high-res tokens in the sequence",
    }
    rows = [["", "a step's time by the base model's", "kept for the backward pass, MiB"]]
    for way, name in names.items():
        rows.append([name, f"{found['ratios'][way]:.2f}", f"{found['kept_mib'][way]:.0f}"])
    return rows


def growth_figure(found: Mapping[str, Any]) -> Figure:
    """Time by the base model's, against the picture's side and against the fraction that is read."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    by_size, by_fraction = figure.subplots(1, 2)
    sizes = {int(side): way for side, way in found["by_size"].items() if side.isdigit()}
    _curves(by_size, sizes, "side of the picture, pixels")
    for side, way in found["all_in_sequence"].items():
        by_size.plot(int(side), way["prefill"], "x", color="#D55E00", markersize=9, label="all tokens in the sequence")
    by_size.set_yscale("log")
    by_size.set_xticks([336, 1008, 3024, 10080], labels=["336", "1008", "3024", "10 080"])
    by_size.legend(frameon=False)
    fractions = {100 * float(name): way for name, way in found["by_fraction"].items() if name != "base"}
    _curves(by_fraction, fractions, "high-res tokens that a layer reads, %")
    by_fraction.set_xticks([1, 10, 100], labels=["1", "10", "100"])
    by_fraction.set_ylim(bottom=0)
    return figure


def _curves(axes: Axes, ways: Mapping[float, Mapping[str, Any]], label: str) -> None:
    for part, colour, marker, name in (
        ("prefill", "#0072B2", "o", "flexkit, prefill"),
        ("decode", "#009E73", "s", "flexkit, a token"),
    ):
        values = [way[part] for way in ways.values()]
        axes.plot(list(ways), values, color=colour, marker=marker, linewidth=2, label=name)
    axes.axhline(1, color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel=label, ylabel="time, base model = 1")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _write(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write whatever there are results of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of JSON files")
    parser.add_argument("folder", type=Path, help="gets tables and figure")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))}
    _write(options.folder / "facts.csv", facts_table(results))
    speeds = {name: found for name, found in results.items() if "prefill_of_all" in found.get("ratios", {})}
    if speeds:
        _write(options.folder / "speed.csv", speed_table(speeds))
        _write(options.folder / "own_states.csv", own_states_table(speeds))
        _write(options.folder / "memory.csv", memory_table(speeds))
    compiled = {name: found for name, found in results.items() if "one_selection" in found.get("ratios", {})}
    if compiled:
        _write(options.folder / "compiled.csv", compiled_table(compiled))
    launches = {name: found for name, found in results.items() if "launches" in found}
    if launches:
        _write(options.folder / "launches.csv", launches_table(launches))
        _write(options.folder / "answers.csv", answers_table(launches))
    for name, found in results.items():
        if "by_size" in found:
            _write(options.folder / "by_size.csv", growth_table(found["by_size"], "side, pixels"))
            _write(options.folder / "by_fraction.csv", growth_table(found["by_fraction"], "fraction read"))
            with rc_context({"svg.fonttype": "none", "svg.hashsalt": "flexkit"}):
                growth_figure(found).savefig(options.folder / "growth.svg", metadata={"Date": None})
        if "kept_mib" in found:
            _write(options.folder / f"{name.split('-')[0]}.csv", training_table(found))


if __name__ == "__main__":
    main()
