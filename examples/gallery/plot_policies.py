"""
What policies select
====================

A policy turns a map of attention into the cells that are read again. Here is one map, of a trained model, under
several policies, and under one that is written on the spot.
"""

import torch
from matplotlib.figure import Figure

import flexkit
from flexkit.visual_search import draw_scene, load_model

model, processor = load_model()
image = draw_scene(0, 400).image
inputs = processor(images=image, text="<image> Which digit is on the object that is yellow?", return_tensors="pt")
with flexkit.trace(model) as trace, torch.no_grad():
    model(**inputs)
scores = trace.scores(0, 0)[0]


def brightest_row(scores: torch.Tensor) -> torch.Tensor:
    """All cells of the row that gets the most attention."""
    rows = scores.sum(-1, keepdim=True)
    return (rows == rows.amax(-2, keepdim=True)).expand(scores.shape)


policies = {
    "Threshold(48 / 255)": flexkit.Threshold(48 / 255),
    "Threshold(48 / 255).pooled(4)": flexkit.Threshold(48 / 255).pooled(4),
    "TopK(6)": flexkit.TopK(6),
    "TopP(0.9)": flexkit.TopP(0.9),
    "TopK(2).dilated(1)": flexkit.TopK(2).dilated(1),
    "TopK(6) & ~Border(1)": flexkit.TopK(6) & ~flexkit.Border(1),
    "brightest_row": brightest_row,
}

# %%
# Each makes a mask on the grid of the high-res tokens, here three times as fine.

figure = Figure(figsize=(9, 4.8), layout="constrained")
panels = figure.subplots(2, 4).flat
panel = next(panels)
panel.imshow(scores, cmap="cividis")
panel.set_title("the map, 8 x 8", fontsize=9)
for (name, policy), panel in zip(policies.items(), panels, strict=True):
    selector = flexkit.AttentionMapSelector(policy)
    mask = selector.select(scores[None, None], 3)[0, 0]
    panel.imshow(mask, cmap="cividis", vmin=0, vmax=1)
    panel.set_title(f"{name}: {int(mask.sum())}", fontsize=9)
for panel in figure.axes:
    panel.set(xticks=[], yticks=[])
