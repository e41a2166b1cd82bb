"""
The method in pictures
======================

Four steps from a picture to an answer, in the small model that flexkit ships. :doc:`/method` says the same in formulas.
"""

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import flexkit
from flexkit.visual_search import draw_scene, load_model

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"

model, processor = load_model()
image = processor.shown(draw_scene(0, 400).image)
inputs = processor(images=image, text="<image> Which digit is on the object that is yellow?", return_tensors="pt")
with flexkit.trace(model) as trace, torch.no_grad():
    model(**inputs)

# %%
# **Two views.** The language model gets a token for every cell of the low-res view. The high-res view is cut into tiles
# of the size that the vision tower takes; it would give nine times as many tokens.

views = Figure(figsize=(7.4, 3.9), layout="constrained")
for panel, side, cells, name in zip(
    views.subplots(1, 2),
    (64, 192),
    (8, 24),
    ("low-res: 64 tokens, in the prompt", "high-res: 9 tiles, 576 tokens"),
    strict=True,
):
    panel.imshow(image.resize((side, side)), extent=(0, cells, cells, 0))
    panel.set_xticks(range(cells + 1), labels=[])
    panel.set_yticks(range(cells + 1), labels=[])
    panel.grid(color="white", linewidth=0.4)
    for edge in range(0, cells + 1, 8):
        panel.axhline(edge, color="white", linewidth=2)
        panel.axvline(edge, color="white", linewidth=2)
    panel.tick_params(length=0)
    panel.set_title(name, fontsize=10)

# %%
# **Where to look, and what to read again.** The last word of the prompt attends to the image tokens; summed over the
# heads that is a map. A policy, here the six best cells, makes of it a selection of high-res tokens.

scores, mask = trace.scores(0, 0)[0], trace.mask(0, 0)[0]
selection = Figure(figsize=(7.4, 3.9), layout="constrained")
first, second = selection.subplots(1, 2)
first.imshow(scores, cmap="cividis", extent=(0, 8, 8, 0))
first.set_title("map of layer 0", fontsize=10)
second.imshow(image, extent=(0, 24, 24, 0))
second.imshow((~mask).float(), cmap="gray_r", alpha=0.75 * (~mask).float(), extent=(0, 24, 24, 0))
second.set_title(f"what layer 1 reads: {int(mask.sum())} of {mask.numel()} tokens", fontsize=10)
for panel in (first, second):
    panel.set(xticks=[], yticks=[])

# %%
# **One softmax over both.** In layer 1 the querying word (below, the last row) has more keys than the others: those of
# the high-res tokens that were selected. They are never queries, so the sequence stays as long as it is.

image_keys, text_keys, read = 8, 6, 6
attention = Figure(figsize=(7.4, 3.4), layout="constrained")
panel = attention.subplots()
length = image_keys + text_keys
for row in range(length):
    for column in range(row + 1):
        colour = BLUE if column < image_keys else GREY
        panel.add_patch(
            Rectangle((column, length - 1 - row), 0.9, 0.9, color=colour, alpha=1 if row == length - 1 else 0.3)
        )
for column in range(read):
    panel.add_patch(Rectangle((length + 1 + column, 0), 0.9, 0.9, color=ORANGE))
panel.text(image_keys / 2, -0.5, "image tokens", ha="center", va="top", color=BLUE)
panel.text(image_keys + text_keys / 2, -0.5, "text", ha="center", va="top", color=GREY)
panel.text(length + 1 + read / 2, -0.5, "selected high-res tokens", ha="center", va="top", color=ORANGE)
panel.text(-0.4, 0.4, "the last word", ha="right", va="center")
panel.text(-0.4, length / 2 + 0.5, "earlier positions:\nthe base model,\nto the bit", ha="right", va="center")
panel.set(xlim=(-5, length + read + 2), ylim=(-1.6, length), aspect="equal")
panel.axis("off")
