"""The other benchmarks run, in little, and the page's tables and figure say what they found."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import growth, language_model, launches, page, training
from benchmarks.families import FAMILIES

LITTLE = ["--width", "128", "--layers", "2", "--rounds", "1", "--device", "cpu"]


def table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_compiled_steps() -> None:
    model = {"layers": 2, "width": 128, "heads": 2, "key_heads": 1}
    found = {"language_model": model, "ratios": {"base": 1.0, "top_k": 1.083, "one_selection": 2.4}}
    assert page.compiled_table({"compiled-128": found})[1:] == [
        ["2 layers of width 128, 2 heads, 1 for keys", "1.08", "2.40"]
    ]


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (growth, language_model, launches, training):
        monkeypatch.setattr(module, "ZOOM", 2)
    monkeypatch.setattr(growth, "ZOOMS", (2, 4))
    monkeypatch.setattr(growth, "FRACTIONS", (0.1, 1.0))
    monkeypatch.setattr(launches, "CASES", ((8, 1), (8, 2)))
    monkeypatch.setattr(launches, "ANSWER", 3)
    results, folder = tmp_path / "results", tmp_path / "page"
    modules = {"growth-128": growth, "launches-128": launches, "mha-128": language_model, "training-128": training}
    for name, module in modules.items():
        module.main([*LITTLE, "--output", str(results / f"{name}.json")])
    page.main([str(results), str(folder)])
    facts = table(folder / "facts.csv")
    assert [row[0] for row in facts] == ["result", *modules]
    assert all(row[4] == "float32" for row in facts[1:])
    counted = table(folder / "launches.csv")
    assert len(counted) == 1 + 2 * 4
    assert all(float(row[3]) >= 1 and int(row[8]) <= 1 for row in counted[1:])
    answers = {way: (float(kernels), int(waits)) for _, way, kernels, _, waits in table(folder / "answers.csv")[1:]}
    assert answers["``training_free``, always read"] == (1, 0) and answers["selection stays"][1] == 3
    assert table(folder / "speed.csv")[1][0] == "2 layers of width 128, 1 heads"
    assert [row[1] for row in table(folder / "own_states.csv")[1:]] == [
        "``training_free``, always read",
        "crop and ask again",
    ]
    sizes = table(folder / "by_size.csv")
    assert [row[0] for row in sizes[1:]] == ["336", "672", "1344", "2688, three levels"]
    costs = [float(row[3]) for row in sizes[1:]]
    assert costs[0] < costs[1] and max(costs[1:]) < 1.1 * min(costs[1:])
    fractions = table(folder / "by_fraction.csv")
    assert [row[0] for row in fractions[1:]] == ["base", "0.1", "1"]
    steps = table(folder / "training.csv")
    assert float(steps[1][1]) == 1 and float(steps[3][2]) < float(steps[4][2])
    assert "all tokens in the sequence" in (folder / "growth.svg").read_text()


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"llava"}))
def test_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads, and asks for more than its base model does."""
    for name, value in {"ZOOM": 2, "CASES": ((8, 1),), "ANSWER": 1}.items():
        monkeypatch.setattr(launches, name, value)
    launches.main([*LITTLE, "--family", family, "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["family"] == family
    (ways,) = found["launches"].values()
    assert {*ways} >= {"base", "steady", "top_k", "threshold"}
    for way in {*ways} - {"base"}:
        assert ways[way]["token"]["bytes"] > ways["base"]["token"]["bytes"]
    # A mask beside the sequence is looked at once.
    assert ways["top_k"]["token"]["waits"] <= (family == "mllama")
