"""Training and evaluation, from nothing to a table, in few steps."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flexkit
from flexkit.__main__ import main
from flexkit.checkpoints.files import held
from flexkit.errors import ConfigError
from flexkit.visual_search import draw_scene, evaluation, load_model, questions
from flexkit.visual_search.choices import LETTERS
from flexkit.visual_search.recipe import CONFIG, STAGES
from flexkit.visual_search.training import train
from flexkit.visual_search.ways import BUDGET
from flexkit.visual_search.weights import READERS
from tests.visual_search import processes
from tests.visual_search.stopping import StoppedError, stop_once

QUICK = {name: replace(stage, steps=3, batch=1) for name, stage in STAGES.items()}
FIELDS = {"accuracy", "questions", "selected_fraction", "lm_gflops", "seconds"}
WAYS = [
    "low_res",
    "flexkit",
    "topk",
    "threshold",
    "top_p",
    "random",
    "center",
    "everything",
    "oracle",
    "all_in_sequence",
]
TWO = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
PLAIN = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in processes.QUICK.items():
            monkeypatch.setattr(evaluation, name, value)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder, seed=3, stages=QUICK, workers=0, quiet=True)
    return folder


SEED = 11
COUNT = processes.QUICK["BATCH"] + 1
"""Questions in two batches that differ in length."""


@pytest.fixture(scope="module")
def command(trained: Path) -> list[str]:
    return ["eval", "visual-search", "--weights", str(trained), "--questions", str(COUNT), "--seed", str(SEED)]


@pytest.fixture(scope="module")
def scores(_quick: None, command: list[str]) -> Any:
    """What the command prints for all tracks."""
    tracks = [f"--track={track}" for track in READERS]
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*command, *tracks, "--json"]) == 0
    return json.loads(printed.getvalue())


def test_a_deeper_base_grows_from_the_same_tower(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "tower").symlink_to(trained / "tower")
    train(tmp_path, seed=3, stages={"base": QUICK["base"]}, layers=6, workers=0, quiet=True)
    deeper, shallower = (load_model("base", weights=folder)[0] for folder in (tmp_path, trained))
    assert len(deeper.model.language_model.layers) == 6 and len(shallower.model.language_model.layers) == 4
    towers = (model.model.vision_tower.state_dict() for model in (deeper, shallower))
    assert all(torch.equal(one, other) for one, other in zip(*(tower.values() for tower in towers), strict=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}/{name}": value
        for path in folder.glob("**/*.safetensors")
        for name, value in load_file(path).items()
    }


def test_every_stage_leaves_a_folder_and_a_log(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == set(STAGES)
    for name, stage in QUICK.items():
        log = json.loads((trained / name / "log.json").read_text())
        assert (log["steps"], log["batch"], log["tracks"]) == (stage.steps, stage.batch, dict(stage.tracks))
        assert not (trained / name / "checkpoints").exists()
    assert all(value.dtype == torch.float16 for value in weights(trained).values())


STARTS = {"base": "tower", "choosing": "lookup", "letters_in_sequence": "choosing"}
"""The model that a stage starts from, if it is not the base."""


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("tower", "lookup")])
def test_stages_train_what_they_say(trained: Path, stage: str) -> None:
    before = load_model(STARTS.get(stage, "base"), weights=trained)[0]
    after = load_model(stage, weights=trained)[0]
    assert flexkit.is_patched(after) == (stage in ("added", "tuned", "conjunction"))
    if flexkit.is_patched(after):
        added = list(flexkit.flex_parameters(after))
        start = 3 if stage == "conjunction" else CONFIG.start_layer
        copies = [layer.self_attn.k_proj.weight for layer in after.model.language_model.layers[start:]]
        assert not any(torch.equal(new, old) for new, old in zip(added[::2], copies, strict=True))
        flexkit.unpatch_model(after)
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    changed = {name for (name, old), new in pairs if not torch.equal(old, new)}
    assert not any("vision_tower" in name for name in changed)
    assert bool(changed) == (stage != "added")


def test_letters_come_with_a_layer_and_tokens_of_their_own(trained: Path) -> None:
    (base, known), (lookup, processor) = (load_model(stage, weights=trained) for stage in ("base", "lookup"))
    assert set(LETTERS) == {*processor.tokenizer.get_vocab()} - {*known.tokenizer.get_vocab()}
    before, after = (dict(model.named_parameters()) for model in (base, lookup))
    new = {name.split(".layers.")[1].split(".")[0] for name in after.keys() - before.keys()}
    assert new == {str(len(base.model.language_model.layers))}
    changed = {
        name for name, old in before.items() if old.shape != after[name].shape or not torch.equal(old, after[name])
    }
    assert changed and not any("vision_tower" in name for name in changed)


def test_what_is_done_is_not_done_again(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.glob("**/*")}
    train(trained, seed=3, stages=QUICK, workers=0, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in trained.glob("**/*")} == before


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path, wait=False):
        with pytest.raises(ConfigError, match="another training is writing to"):
            train(tmp_path, stages=QUICK, workers=0, quiet=True)
        assert main(["train", "visual-search", "--output", str(tmp_path)]) == 2
    assert "\n" not in capsys.readouterr().err.removeprefix("flexkit: ").rstrip("\n")
    assert list(tmp_path.iterdir()) == []
    train(tmp_path, stages={}, workers=0, quiet=True)


@pytest.mark.parametrize("name", [stage for stage in STAGES if stage != "conjunction"])
def test_a_stage_that_was_cut_off_goes_on(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for earlier in ("tower", "base", "added", "lookup", "choosing"):
        if earlier != name:
            (tmp_path / earlier).symlink_to(trained / earlier)
    stage = replace(QUICK[name], save_steps=2)
    taken = stop_once(monkeypatch)
    with pytest.raises(StoppedError):
        train(tmp_path, seed=3, stages={name: stage}, workers=0, quiet=True)
    train(tmp_path, seed=3, stages={name: stage}, workers=0, quiet=True)
    assert taken == [0, 1, 2, 2]
    one, other = (weights(folder / name) for folder in (tmp_path, trained))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_table_has_every_track_and_way(
    scores: Any, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(scores) == list(READERS)
    for track in scores.values():
        assert list(track) == WAYS
        for name, score in track.items():
            assert set(score) == FIELDS and score["questions"] == COUNT
            assert 0 <= score["accuracy"] <= 1 and score["lm_gflops"] > 0 and score["seconds"] > 0
            if name in ("topk", "random", "center", "oracle"):
                assert score["selected_fraction"] == pytest.approx(BUDGET / 64)
        assert track["low_res"]["selected_fraction"] == 0 and track["everything"]["selected_fraction"] == 1
        assert track["low_res"]["lm_gflops"] < track["flexkit"]["lm_gflops"] < track["all_in_sequence"]["lm_gflops"]

    def known(seed: int, count: int, *, tracks: list[str], **options: Any) -> Any:
        assert (seed, count) == (SEED, COUNT)
        return {track: scores[track] for track in tracks}

    monkeypatch.setattr(evaluation, "evaluate", known)
    assert main([*command, "--track", "attribute"]) == 0
    printed = capsys.readouterr().out
    assert f"attribute ({COUNT} questions)" in printed and "all_in_sequence" in printed and "low-res" not in printed


def test_accuracy_is_the_share_of_right_answers(scores: Any, trained: Path) -> None:
    model, processor = load_model("base", weights=trained)
    right = 0
    for index in range(COUNT):
        scene = draw_scene([SEED, index])
        asked = questions(scene, "attribute")
        question = asked[index % len(asked)]
        inputs = processor(images=scene.image, text=f"<image> {question.text}", return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]
        right += processor.decode(answer) == question.answer
    assert scores["attribute"]["low_res"]["accuracy"] == right / COUNT


def test_two_processes_give_the_same_numbers(scores: Any, command: list[str]) -> None:
    """Each has a batch of its own, of another length; they are asked for one track, and get no other."""
    root = Path(processes.__file__).parents[2]
    environment: dict[str, Any] = {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, *TWO, *PLAIN, processes.__file__, *command, "--json", "--track", "attribute"]
    done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert list(together) == ["attribute"]
    for name in WAYS:
        alone, shared = (
            {k: v for k, v in of["attribute"][name].items() if k != "seconds"} for of in (scores, together)
        )
        assert alone == pytest.approx(shared)
