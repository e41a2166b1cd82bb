import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Models this small are slower on several threads, and xdist has a process for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# PyTorch that is told to take the CPU for an older one asks oneDNN what it can do.
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.matrix import Matrix

settings.register_profile("dev", deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.register_profile("fuzz", settings.get_profile("dev"), max_examples=10_000)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# torch is imported where it is needed: the process that only hands out tests to others does without.


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that sees the reports of all others
        config.pluginmanager.register(Matrix(), "matrix")


REPEATING = {"accounting", "families", "patching"}
"""Folders whose tests run the same lines on model after model: coverage looks at the first case of each test."""
USING = {"benchmarks", "distributed", "examples", "studies", "training", "ways"}
"""Folders whose tests use flexkit as a whole, nearly all of whose lines the others run too: coverage looks away."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen = set()
    for item in items:
        folder, test = item.path.relative_to(Path(__file__).parent).parts[0], item.nodeid.partition("[")[0]
        if folder in USING or (folder in REPEATING and test in seen):
            item.add_marker("no_cover")  # measuring slows down every line of torch and transformers as well
        seen.add(test)
    on_a_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_a_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_a_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What was imported stays: Trainer collects garbage around every run, and need not look through all of it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # what tests keep, models above all, takes longer and longer to look through


@pytest.fixture(scope="session", autouse=True)
def _one_kind_of_device() -> None:
    """torch.manual_seed notes the whole stack for each kind of device that a machine lacks: 4 ms, many times a test."""
    import torch

    if not torch.cuda.is_available():
        setattr(torch, "manual_seed", torch.default_generator.manual_seed)  # noqa: B010 - mypy: it is a function


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def fact(record_property: Any) -> Any:
    """A function that notes facts of a model type for the table of supported models."""

    def note(model_type: str, facts: dict[str, str]) -> None:
        record_property("model type", model_type)
        for name, value in facts.items():
            record_property(name, value)

    return note
