"""Which plans for attention are taken, and what is said of the others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from flexkit import UnsupportedModelError
from flexkit.patching.seam.tensor_parallel import share_of

APART = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
GATHERED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output") | {"o_proj": "rowwise_split_input"}
LATENT = {"q_proj": "colwise", "kv_a_proj_with_mqa": "mla_kv_a_proj", "kv_b_proj": "colwise", "o_proj": "rowwise"}
PACKED = {"query_key_value": "colwise", "dense": "rowwise"}
PLACES = {"colwise": Shard(0), "colwise_gather_output": Shard(0), "mla_kv_a_proj": Replicate()}


class Model(nn.Module):
    """One attention module with four heads of 8, and a plan by which it is shared out."""

    tp_size = 2

    def __init__(self, plan: dict[str, str], mesh: Any, *, projection: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.tp_plan = {f"layers.*.{name}": style for name, style in plan.items()}
        attention: Any = nn.Module()
        attention.head_dim = 8
        for name in (*APART, *LATENT, *PACKED):
            linear = projection(32, 32)
            if name in plan:
                place = PLACES.get(plan[name], Shard(1))
                linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, mesh, [place]))
            attention.add_module(name, linear)
        self.layers = nn.ModuleList([attention])


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def share(model: Any, *names: str) -> Any:
    return share_of(model, model.layers[0], model.layers[0], names)


@pytest.mark.parametrize(
    ("plan", "names", "apart"),
    [
        (APART, ("k_proj", "v_proj"), True),
        (LATENT, ("kv_a_proj_with_mqa", "kv_b_proj"), True),
        (GATHERED, ("k_proj", "v_proj"), False),
    ],
)
def test_those_that_are_taken(plan: dict[str, str], names: tuple[str, ...], apart: bool, mesh: Any) -> None:
    found = share(Model(plan, mesh), *names)
    assert found.styles.keys() == set(names) and found.mesh == mesh
    assert (found.processes is not None) == apart


def test_none_is_none(mesh: Any) -> None:
    model = Model({}, mesh)
    assert share(model, "k_proj", "v_proj") is None
    model.tp_plan = APART
    model.tp_size = 1
    assert share(model, "k_proj", "v_proj") is None


class Adapted(nn.Linear):
    """Stands for a projection that an adapter or a quantiser has put in the place of the model's own."""


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        (PACKED, ("query_key_value",)),
        ({**APART, "v_proj": "colwise_gather_output"}, ("k_proj", "v_proj")),
        ({**GATHERED, "o_proj": "rowwise"}, ("k_proj", "v_proj")),
        ({"q_proj": "colwise", "k_proj": "colwise", "o_proj": "rowwise"}, ("k_proj", "v_proj")),
        ({"k_proj": "colwise", "v_proj": "colwise"}, ("k_proj", "v_proj")),
    ],
    ids=["packed", "values gathered", "split twice", "values alone", "not put together"],
)
def test_those_that_nobody_has_tried(plan: dict[str, str], names: tuple[str, ...], mesh: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"how Module is shared out among 2 processes by this tp_plan \(.*:"
    ):
        share(Model(plan, mesh), *names)


def test_projections_of_others(mesh: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="how Module is shared out"):
        share(Model(APART, mesh, projection=Adapted), "k_proj", "v_proj")


def test_parameters_of_its_own(mesh: Any) -> None:
    """Such as attention sinks, one for each head."""
    model = Model(APART, mesh)
    sinks = model.layers[0].q_proj.weight[0].detach()
    model.layers[0].sinks = nn.Parameter(distribute_tensor(sinks.full_tensor(), mesh, [Shard(0)]))
    with pytest.raises(UnsupportedModelError, match="how Module is shared out"):
        share(model, "k_proj", "v_proj")


def test_weights_that_are_whole(mesh: Any) -> None:
    model = Model({}, mesh)
    model.tp_plan = Model(APART, mesh).tp_plan
    with pytest.raises(UnsupportedModelError, match="how Module is shared out"):
        share(model, "k_proj", "v_proj")


@pytest.mark.parametrize(("size", "heads"), [(3, 4), (8, 4)])
def test_heads_that_do_not_come_out_even(size: int, heads: int, mesh: Any) -> None:
    model = Model(APART, mesh)
    model.tp_size = size
    with pytest.raises(
        UnsupportedModelError, match=f"the {heads} key heads of Module .* evenly among {size} processes"
    ):
        share(model, "k_proj", "v_proj")
