"""Two processes with half the heads each do what one with all of them does."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexkit
from tests.distributed import ranks
from tests.distributed.ranks import DEEP, FEATURES, OTHERS, OWN, TRAINED, Found, config_of, deeply, shallowly
from tests.versions import before
from tests.zoo import ZOO

deep = pytest.mark.parametrize("name", DEEP)


@cache
def built(name: str) -> Any:
    """A patched model whose added projections are no copies any more."""
    model = flexkit.patch_model(ZOO[name].model(), config_of(name, FEATURES["top k"]), trained=True)
    with torch.no_grad():
        for parameter in flexkit.flex_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@cache
def alone(name: str) -> Found:
    """What one process finds."""
    return deeply(name, built(name)) if name in DEEP else shallowly(name, built(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in {*DEEP, *OTHERS, "gemma3"}:
        built(name).save_pretrained(folder / name)
    ZOO["chameleon"].model().save_pretrained(folder / "chameleon")
    config = ZOO["llava"].config()
    config.text_config.num_key_value_heads = 1
    ZOO["llava"].model_class(config).save_pretrained(folder / "one key head")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Found]]:
    """What each of two processes found; starting them takes as long as much of what they do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(ranks.__file__).parents[2]
    paths = os.pathsep.join((*filter(None, [os.environ.get("PYTHONPATH")]), str(root)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, ranks.__file__, str(folder)], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def flat(found: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors that were found, by name."""
    if isinstance(found, Tensor):
        return {name: found}
    return {key: value for inner, part in found.items() for key, value in flat(part, f"{name}/{inner}").items()}


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], rtol=0, atol=tolerance, msg=lambda told, name=name: name + told)


@pytest.mark.parametrize("name", [*DEEP, *OTHERS])
def test_processes_agree_to_the_bit(name: str, results: list[dict[str, Found]]) -> None:
    """Or they would select other tokens, and wait for each other in vain."""
    first, second = (flat(found[name]) for found in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(found, second[key]) for key, found in first.items())


@deep
@pytest.mark.parametrize("way", FEATURES)
def test_logits(name: str, way: str, results: list[dict[str, Found]]) -> None:
    found = results[0][name]
    assert (found[way] - found["disabled"]).abs().max() > 1e-2
    assert_same(found[way], alone(name)[way])


@deep
@pytest.mark.parametrize("way", ["asked", "static", "pyramid", *OWN])
def test_answers(name: str, way: str, results: list[dict[str, Found]]) -> None:
    if way == "pyramid" and name != "llava":
        pytest.skip("only towers of a fixed size have pyramids")
    found = results[0][name]
    assert (found[way]["logits"][0] - found["disabled"][:, -1]).abs().max() > 1e-2
    assert_same(found[way], alone(name)[way])


@deep
@pytest.mark.parametrize("way", ["disabled", "unpatched"])
def test_the_base_model(name: str, way: str, results: list[dict[str, Found]]) -> None:
    assert torch.equal(results[0][name]["disabled"], results[0][name]["unpatched"])
    assert_same(results[0][name][way], alone(name)[way])


@deep
def test_patched_where_it_is_loaded(name: str, results: list[dict[str, Found]]) -> None:
    """Added projections are copies of the layer's own parts, and compute with weights of their own."""
    assert_same(results[0][name]["copies"], alone(name)["copies"])


@pytest.mark.parametrize("name", [*DEEP, *TRAINED])
@pytest.mark.parametrize("kind", ["reading", "not reading"])
def test_a_training_step(name: str, kind: str, results: list[dict[str, Found]]) -> None:
    ours, theirs = (found["training"][kind] for found in (results[0][name], alone(name)))
    added = [key for key in ours["gradients"] if "_hd." in key]
    assert added and all(bool(ours["gradients"][key].any()) == (kind == "reading") for key in added)
    assert_same(ours, theirs)


@deep
def test_saved_by_two_and_loaded_by_one(name: str, results: list[dict[str, Found]], folder: Path) -> None:
    first, second = (flexkit.from_pretrained(folder / of, dtype=torch.float64) for of in (name, f"{name} again"))
    theirs = second.state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in first.state_dict().items())
    assert first.state_dict().keys() == theirs.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_kinds_of_attention(name: str, results: list[dict[str, Found]]) -> None:
    ours, theirs = results[0][name], alone(name)
    assert (ours["patched"] - theirs["base"]).abs().max() > 1e-2
    # Some norms compute in float32, whatever the model does.
    own = (ours["base"] - theirs["base"]).abs().max()
    assert (ours["patched"] - theirs["patched"]).abs().max() <= max(1e-6, 10 * float(own))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("one key head", "UnsupportedModelError: the 1 key heads of LlamaAttention .* among 2 processes"),
        ("mixed", "UnsupportedModelError: flexkit does not know how LlamaAttention .*k_proj: colwise_gather_output"),
        ("fsdp", "UnsupportedModelError: the weights of this .* before FSDP"),
        ("fsdp of a part", "UnsupportedModelError: the weights of this .* before FSDP"),
        ("stages", "UnsupportedModelError: this process has some layers of Chameleon.* pipeline parallelism"),
        ("stages of most", "AttributeError: 'LlavaModel' object has no attribute 'layers'"),
        pytest.param(
            *("tied head", "UnsupportedModelError: transformers .* shares out the head of Gemma3.* take a newer one"),
            marks=pytest.mark.skipif(not before("5.23"), reason="gemma3 runs"),
        ),
    ],
)
def test_who_is_refused(way: str, words: str, results: list[dict[str, Found]]) -> None:
    for found in results:
        assert len(found["refusals"][way].splitlines()) == 1
        assert re.match(words, found["refusals"][way])
