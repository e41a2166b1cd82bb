"""Training from the command line on conversations about drawn scenes, which only the high-res view answers."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, Trainer

import flexkit
from flexkit.__main__ import main
from flexkit.training import Conversation, ConversationCollator, ConversationDataset, choose_start_layer, trainable
from flexkit.visual_search import draw_scene, load_model, questions
from flexkit.visual_search.weights import WEIGHTS

BASE = str(WEIGHTS / "base")
SAMPLES, UNSEEN, BATCH = 64, 8, 4
STEPS = SAMPLES // BATCH
RUN = ("--model", BASE, "--workers", "0", "--batch", str(BATCH), "--learning-rate", "4e-3", "--quiet")


def record(seed: int) -> dict[str, Any]:
    """Two questions about the digits of a scene."""
    turns = []
    for question in list(questions(draw_scene(seed), "attribute"))[:2]:
        turns += [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": seed, "image": f"{seed}.png", "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data.json`` and ``unseen.jsonl`` with their pictures in ``images``."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    records = [record(seed) for seed in range(SAMPLES + UNSEEN)]
    for seed in range(SAMPLES + UNSEEN):
        draw_scene(seed).image.save(folder / "images" / f"{seed}.png")
    (folder / "data.json").write_text(json.dumps(records[:SAMPLES]))
    (folder / "unseen.jsonl").write_text("\n".join(map(json.dumps, records[SAMPLES:])))
    return folder


@pytest.fixture(scope="module")
def command(folder: Path) -> Callable[..., int]:
    """Train on the data from the command line."""

    def run(output: str, *options: str, data: str = "data.json") -> int:
        given = ("--data", str(folder / data), "--images", str(folder / "images"), "--output", str(folder / output))
        return main(["train", *given, *RUN, *options])

    return run


@pytest.fixture(scope="module")
def trained(folder: Path, command: Callable[..., int]) -> Path:
    """What a run that nobody stopped has left."""
    evaluated = ("--eval-data", str(folder / "unseen.jsonl"), "--eval-steps", str(STEPS))
    assert command("whole", "--save-steps", str(STEPS // 2), *evaluated) == 0
    return folder / "whole"


@pytest.fixture
def unseen(folder: Path) -> list[Conversation]:
    dataset = ConversationDataset(folder / "unseen.jsonl", folder / "images")
    return [dataset[index] for index in range(len(dataset))]


def loss_of(model: Any, processor: Any, conversations: list[Conversation]) -> float:
    with torch.no_grad():
        return float(model.eval()(**ConversationCollator(processor)(conversations)).loss)


def untrained() -> tuple[Any, Any]:
    model, processor = load_model("base")
    flexkit.patch_model(model, flexkit.FlexConfig.published(), trained=True)
    return model, flexkit.FlexProcessor(processor, model)


def test_it_learns_what_only_the_high_res_view_shows(trained: Path, unseen: list[Conversation]) -> None:
    model, processor = flexkit.from_pretrained(trained), flexkit.FlexProcessor.from_pretrained(trained)
    loss = loss_of(model, processor, unseen)
    before, processor_before = untrained()
    assert loss < loss_of(before, processor_before, unseen)
    with flexkit.disabled(before):
        assert loss < 0.5 * loss_of(before, processor_before, unseen)
    right = 0
    for conversation in unseen:
        asked = [
            part if part["type"] == "text" else part | {"image": conversation.images[0]}
            for part in conversation.messages[0]["content"]
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(said) == f"{conversation.messages[1]['content'][0]['text']} </s>"
    assert right >= UNSEEN // 2

    history = json.loads((trained / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    noted = [entry["eval_loss"] for entry in history["log_history"] if "eval_loss" in entry]
    # The mean of two batches of as many labels as here, each summed in float32.
    assert noted == pytest.approx([loss], rel=1e-4)


def test_the_base_model_stays_as_it_was(trained: Path) -> None:
    ours, theirs = load_file(trained / "model.safetensors"), load_model("base")[0].state_dict()
    model = AutoModelForImageTextToText.from_pretrained(trained)
    assert ours and all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_stopped_and_resumed_to_the_same_bits(
    trained: Path, folder: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--save-steps", str(STEPS // 2))
    steps: Iterator[int] = iter(range(STEPS))
    step = Trainer.training_step

    def stopped(*arguments: Any, **settings: Any) -> Tensor:
        if next(steps) == 3 * STEPS // 4:
            raise KeyboardInterrupt
        return step(*arguments, **settings)

    monkeypatch.setattr(Trainer, "training_step", stopped)
    assert command("stopped", *options) == 130
    monkeypatch.undo()
    assert not (folder / "stopped" / "model.safetensors").exists()
    assert command("stopped", *options) == 2, "its checkpoints are not written over"
    assert command("stopped", *options, "--resume") == 0
    ours, theirs = (flexkit.from_pretrained(path).state_dict() for path in (folder / "stopped", trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_other_weights(weights: str, folder: Path, command: Callable[..., int], unseen: list[Conversation]) -> None:
    pytest.importorskip("peft")
    assert command(weights, "--train", weights, "--rank", "2", "--max-steps", "2", "--gradient-checkpointing") == 0
    model = flexkit.from_pretrained(folder / weights)
    processor = flexkit.FlexProcessor.from_pretrained(folder / weights)
    before, processor_before = untrained()
    assert loss_of(model, processor, unseen) < loss_of(before, processor_before, unseen)
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert any("k_proj_hd" in name for name in changed) and any("q_proj" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed) == (weights == "all")


def test_in_bfloat16_what_is_trained_is_not(folder: Path, command: Callable[..., int]) -> None:
    model, _ = untrained()
    trainable(model.bfloat16())
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert command("bf16", "--bf16", "--max-steps", "1") == 0
    assert flexkit.from_pretrained(folder / "bf16").dtype == torch.bfloat16


def test_broken_samples_are_named_and_counted(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(seed) for seed in range(5)]
    records[1]["image"] = "none.png"
    records[2]["image"] = "torn.png"
    records[3]["conversations"][0]["from"] = "nobody"
    torn = (folder / "images" / "0.png").read_bytes()
    (folder / "images" / "torn.png").write_bytes(torn[: len(torn) // 2])
    (folder / "broken.json").write_text(json.dumps(records))
    assert command("broken", data="broken.json") == 2
    assert "record 1 (id 1)" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="left out"):
        assert command("broken", "--on-broken", "skip", data="broken.json") == 0
    told = capsys.readouterr().err
    assert "samples left out: 3" in told and "none.png" in told
    assert "conversations[0].from must be one of" in told and "record 2 (id 2)" in told


@pytest.mark.parametrize("option", ["--added", "--model"])
def test_going_on_from_what_was_trained(
    option: str, trained: Path, folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(f"on{option}", option, str(trained), "--zoom", "2") == 2
    assert f"--zoom stands in what {option} names" in capsys.readouterr().err
    assert command(f"on{option}", option, str(trained), "--max-steps", "1", "--learning-rate", "1e-9") == 0
    ours, theirs = (flexkit.from_pretrained(path).state_dict() for path in (folder / f"on{option}", trained))
    for name, tensor in ours.items():
        # A step of AdamW is at most the learning rate, and a rounding of the sum.
        torch.testing.assert_close(tensor, theirs[name], rtol=2**-23, atol=2e-9)


def test_the_start_layer_is_asked_of_the_data(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = ConversationDataset(folder / "unseen.jsonl", folder / "images")
    model, processor = load_model("base")
    config, probe = choose_start_layer(model, processor, dataset, flexkit.FlexConfig.published())
    assert not flexkit.is_patched(model) and config.start_layer == probe.layer + 1
    assert command("probed", "--start-layer", "probe", "--max-steps", "1", data="unseen.jsonl") == 0
    assert f"layers read from {config.start_layer} on" in capsys.readouterr().out
    # One sample has no standard error: nothing is sure.
    config, _ = choose_start_layer(model, processor, dataset, flexkit.FlexConfig.published(), samples=1)
    assert config.start_layer is None


def test_training_free_settings_have_nothing_added(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("free", "--preset", "training-free") == 2
    assert 'train "lora" or "all"' in capsys.readouterr().err


def test_samples_that_are_too_long(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("long", "--max-length", "70") == 2
    assert "tokens, more than 70" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--data FILE, or visual-search"),
        (["--model", BASE], "--data FILE, or visual-search"),
        (["visual-search", "--data", "any.json"], "--data does not go with visual-search"),
        (["visual-search", "--resume"], "--resume does not go with visual-search"),
        (["--data", "any.json", "--model", BASE, "--layers", "3"], "--layers does not go with --data"),
        (["--data", "any.json"], "--data goes with --model"),
        (["--data", "none.json", "--model", BASE], "none.json cannot be read"),
        (["--data", "{data}", "--images", "{images}", "--model", BASE, "--repeats", "1", "2"], "--repeats must be"),
        (
            ["--data", "{data}", "--images", "{images}", "--model", BASE, "--chat-template", "none"],
            "'none' cannot be read",
        ),
        (["--data", "{data}", "--images", "{images}", "--model", "{data}"], "cannot be loaded"),
        (["--data", "{data}", "--model", BASE, "--learning-rate", "0"], "--learning-rate"),
        (["--data", "{data}", "--model", BASE, "--start-layer", "first"], "--start-layer"),
    ],
)
def test_what_does_not_go_together(
    options: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"data": str(folder / "data.json"), "images": str(folder / "images")}
    try:
        code: Any = main(["train", *(option.format(**places) for option in options), "--output", str(folder / "no")])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and told in capsys.readouterr().err


def test_tensorboard(
    folder: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkit.training.trainer.find_spec", lambda name: None)
    assert command("board", "--report-to", "tensorboard") == 2
    assert "pip install 'flexkit-vlm[tensorboard]'" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    assert command("board", "--report-to", "tensorboard", "--max-steps", "1") == 0
    assert list((folder / "board").rglob("events.out.tfevents*"))
    shutil.rmtree(folder / "board")
