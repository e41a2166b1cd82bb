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
from tests.training import processes
from tests.training.processes import batches, by_trainer, loop, share
from tests.training.stripes import base_model, main_families, model_for
from tests.zoo import MAIN, low_res

Results = list[dict[str, dict[str, processes.Result]]]

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Without a GPU accelerate starts several processes only where it is told that there are some.
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def launched(launcher: tuple[str, ...], folder: Path, task: str, *names: str) -> Results:
    """What each of two processes made of a task."""
    command = [sys.executable, "-m", *launcher, processes.__file__, str(folder), task, *names]
    root = Path(processes.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loops")


@pytest.fixture(scope="module")
def loops(folder: Path) -> Results:
    return launched(TORCHRUN, folder, "loops", *MAIN)


@main_families
@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp finely", "ddp everything", "fsdp everything"])
def test_two_processes_are_as_good_as_one(name: str, way: str, loops: Results) -> None:
    first, second = (results[name][way] for results in loops)
    assert torch.equal(first["losses"], second["losses"])
    assert same_bits(first["weights"], second["weights"])
    alone = loop(model_for(name, trains_all="everything" in way), batches(name))
    assert alone["losses"][0] != alone["losses"][-1]
    assert_close(first, alone)


@main_families
@pytest.mark.parametrize("way", ["ddp some", "fsdp some"])
def test_one_process_without_the_high_res_view(name: str, way: str, loops: Results) -> None:
    """Its gradients are 0, and no process waits for the other in vain."""
    first, second = (results[name][way] for results in loops)
    assert same_bits(first["weights"], second["weights"])
    model = model_for(name)
    optimizer = torch.optim.SGD(flexkit.flex_parameters(model), lr=0.1, momentum=0.5)
    for batch in batches(name):
        optimizer.zero_grad()
        halves = [share(batch, rank, 2) for rank in range(2)]
        (0.5 * (model(**halves[0]).loss + model(**low_res(halves[1])).loss)).backward()
        optimizer.step()
    expected = added_parameters(model)
    for key, value in expected.items():
        torch.testing.assert_close(first["weights"][key], value.detach(), rtol=0, atol=1e-5)


@main_families
def test_sharded_weights_are_saved_whole(name: str, loops: Results, folder: Path) -> None:
    loaded = flexkit.load_flex(base_model(name), folder / name)
    expected = loops[0][name]["fsdp"]["weights"]
    assert all(torch.equal(value, expected[key]) for key, value in added_parameters(loaded).items())


def test_trainer_under_accelerate(tmp_path: Path) -> None:
    results = launched(ACCELERATE, tmp_path, "trainer", "llava")
    first, second = (result["llava"]["trainer"] for result in results)
    assert first["shared"] and same_bits(first["weights"], second["weights"])
    assert_close(first, by_trainer("llava", tmp_path)["trainer"])


def same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def assert_close(ours: processes.Result, expected: processes.Result) -> None:
    torch.testing.assert_close(ours["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["weights"], expected["weights"], rtol=1e-5, atol=1e-5)
