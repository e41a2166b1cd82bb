"""Two processes train as one does: DistributedDataParallel, FSDP2, and Trainer under accelerate."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flexkit
from flexkit.patching import added_parameters
from tests.training import contexts, processes
from tests.training.processes import BESIDE, ROWS, STEPS, batches, by_trainer, loop, share
from tests.training.stripes import base_model, doubled, joined, main_families, model_for
from tests.zoo import MAIN, low_res

Results = list[dict[str, dict[str, processes.Result]]]

# A torchrun that Trainer knows too.
# Without a GPU it starts several processes only where it is told that there are some.
LAUNCHER = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What each of two processes made of the tasks; starting them takes longer than all they do."""
    command = [sys.executable, "-m", *LAUNCHER, processes.__file__, str(folder), *MAIN]
    root = Path(processes.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "told").write_text(done.stderr)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@main_families
@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp finely", "ddp everything", "fsdp everything"])
def test_two_processes_are_as_good_as_one(name: str, way: str, results: Results) -> None:
    first, second = (result[name][way] for result in results)
    assert torch.equal(first["losses"], second["losses"])
    assert same_bits(first["weights"], second["weights"])
    alone = loop(model_for(name, trains_all="everything" in way), batches(name))
    assert alone["losses"][0] != alone["losses"][-1]
    assert_close(first, alone)


@main_families
@pytest.mark.parametrize("way", ["ddp some", "fsdp some"])
def test_one_process_without_the_high_res_view(name: str, way: str, results: Results) -> None:
    """Its gradients are 0, and no process waits for the other in vain."""
    first, second = (result[name][way] for result in results)
    assert same_bits(first["weights"], second["weights"])
    model = model_for(name).double()
    optimizer = torch.optim.SGD(flexkit.flex_parameters(model), lr=0.1, momentum=0.5)
    for batch in map(doubled, batches(name)):
        optimizer.zero_grad()
        halves = [share(batch, rank, 2) for rank in range(2)]
        (0.5 * (model(**halves[0]).loss + model(**low_res(halves[1])).loss)).backward()
        optimizer.step()
    expected = added_parameters(model)
    for key, value in expected.items():
        torch.testing.assert_close(first["weights"][key], value.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_an_image_beside_the_sequence(way: str, results: Results) -> None:
    """Its high-res view is read by a run of the model that ends early, also in shards."""
    first, second = (result[BESIDE][way] for result in results)
    assert same_bits(first["weights"], second["weights"])
    assert_close(first, loop(contexts.model_for(BESIDE), [joined(contexts.examples(BESIDE, ROWS))] * STEPS))


@main_families
def test_sharded_weights_are_saved_whole(name: str, results: Results, folder: Path) -> None:
    loaded = flexkit.load_flex(base_model(name).double(), folder / name)
    expected = results[0][name]["fsdp"]["weights"]
    assert all(torch.equal(value, expected[key]) for key, value in added_parameters(loaded).items())


def test_trainer_under_accelerate(results: Results, tmp_path: Path) -> None:
    first, second = (result["llava"]["trainer"] for result in results)
    assert first["shared"] and same_bits(first["weights"], second["weights"])
    assert_close(first, by_trainer("llava", tmp_path)["trainer"])


def test_conversations_under_accelerate(results: Results, folder: Path) -> None:
    """The model is written once, and what either process could not use is told once."""
    assert len(results) == 2 and flexkit.is_patched(flexkit.from_pretrained(folder / "own"))
    assert (folder / "told").read_text().count("samples left out: 1") == 1


def same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def assert_close(ours: processes.Result, expected: processes.Result) -> None:
    # transformers takes the loss in float32: what is left of that is a step of it.
    torch.testing.assert_close(ours["losses"], expected["losses"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours["weights"], expected["weights"], rtol=1e-6, atol=1e-6)
