"""``generate`` with a decode step that is compiled, and what it was compiled to."""

from collections.abc import Callable
from typing import Any

import einops
import torch
import transformers as tf

for operation in (einops.rearrange, einops.reduce, einops.repeat):
    torch.compiler.allow_in_graph(operation)  # tracing how they read their patterns would take most of the time


def collecting(graphs: list[Any]) -> Callable[..., Any]:
    """A backend that compiles nothing, but collects graphs."""

    def collect(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return collect


def compiled(graphs: list[Any], *, fullgraph: bool = True) -> dict[str, Any]:
    """Settings with which ``generate`` compiles the decode step, to one graph or it fails; graphs are collected."""
    config = tf.CompileConfig(fullgraph=fullgraph, backend=collecting(graphs), mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}
