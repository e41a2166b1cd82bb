"""Tensor parallelism: attention modules whose heads are shared out among processes, by ``tp_plan`` of transformers.

Every process runs the whole model on the same inputs, and computes some heads of each layer. What rows read follows of
itself: keys, values and outputs are those of its heads. A map is of all heads, so processes add up theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from flexkit.errors import UnsupportedModelError

__all__ = ["HeadShare", "check_shares", "share_of"]

_APART = ({"colwise", "rowwise"}, {"mla_kv_a_proj", "colwise", "rowwise"})
"""Styles of the projections of attention in which each process computes heads of its own."""
_WHOLE = tuple({made, "rowwise_split_input"} for made in ("colwise_gather_output", "colwise_rep"))
"""Those in which each projects a part, and computes all heads of what all have projected."""
_OF_NORMS = "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class HeadShare:
    """How the heads of an attention module, or only what makes their keys and values, are shared out."""

    mesh: Any
    """The processes, as transformers laid them out."""
    styles: Mapping[str, Any]
    """By name of a projection, what transformers does around it."""
    processes: Any
    """Those with other heads, a process group; None if each has all of them."""

    def shared_out(self, name: str, projection: nn.Module) -> nn.Module:
        """A copy of a projection, with what is done around that."""
        for left in ("forward", "_is_hooked"):  # of the copied one: it computes with the weights of that
            vars(projection).pop(left, None)
        self.styles[name].install_forward(projection, self.mesh)
        return projection


def check_shares(model: PreTrainedModel) -> None:
    """Raise :class:`~flexkit.errors.UnsupportedModelError` for weights that anything but ``tp_plan`` shares out."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "full_tensor")}
    most = 1 if (model.tp_size or 1) > 1 else 0
    if len(meshes) > most or any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"the weights of this {type(model).__name__} are shared out among processes, and not by transformers' "
            "tp_plan alone: patch it before FSDP shards it."
        )
    head = model.get_output_embeddings()
    if hasattr(getattr(head, "weight", None), "full_tensor") and "forward" not in vars(head):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} shares out the head of {type(model).__name__}, whose weights are "
            "those of its embeddings, and runs it as if it were whole; take a newer one, or load without tp_plan."
        )
    if hasattr(model, "_pp_stage"):
        raise UnsupportedModelError(
            f"this process has some layers of {type(model).__name__} and others have the rest: flexkit does not read "
            "under pipeline parallelism; load it with pp_size=1, or with device_map."
        )


def share_of(model: PreTrainedModel, attention: nn.Module, source: nn.Module, names: Sequence[str]) -> HeadShare | None:
    """How an attention module is shared out; None if every process has all of it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The whole model, whose ``tp_plan`` says so.
    attention, source : torch.nn.Module
        The module, and the one whose keys it attends to.
    names : sequence of str
        The projections that make these.

    Raises
    ------
    UnsupportedModelError
        If its maps and its projections are not known to be those of one process.
    """
    size = model.tp_size or 1
    if size == 1:
        return None
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

    paths = {module: path for path, module in model.named_modules()}
    inner = {name: child for module in (source, attention) for name, child in module.named_modules() if name}
    plan = {name: model.tp_plan.get(replace_layer_number_by_wildcard(paths[child])) for name, child in inner.items()}
    plan = {name: style for name, style in plan.items() if style not in (None, _OF_NORMS)}
    sharded = [of for module in (source, attention) for of in module.parameters() if hasattr(of, "full_tensor")]
    if not plan and not sharded:
        return None
    kind, own, styles = type(attention).__name__, [inner[name] for name in names], set(plan.values())
    apart = styles in _APART
    known = sharded and plan.keys() >= set(names) and (apart or styles in _WHOLE)
    plain = all(type(projection) is nn.Linear for projection in own) and "query_key_value" not in names
    bare = any(hasattr(of, "full_tensor") for of in attention.parameters(recurse=False))
    if not known or not plain or bare:
        told = ", ".join(f"{name}: {style}" for name, style in plan.items())
        raise UnsupportedModelError(
            f"flexkit does not know how {kind} is shared out among {size} processes by this tp_plan ({told}); load the "
            "model without."
        )
    described: Any = attention
    heads = own[-1].out_features // attention.head_dim if hasattr(attention, "head_dim") else described.num_heads
    if apart and heads % size:
        raise UnsupportedModelError(
            f"the {heads} key heads of {kind} cannot be shared out evenly among {size} processes; start fewer, or load "
            "the model without tp_plan."
        )
    mesh: Any = sharded[0].device_mesh  # type: ignore[attr-defined]
    styled = {name: ALL_PARALLEL_STYLES[plan[name]] for name in names}
    return HeadShare(mesh, styled, mesh.get_group() if apart else None)
