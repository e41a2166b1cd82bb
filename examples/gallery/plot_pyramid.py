"""
Three zooms deep
================

A large picture is read at 3, 9 and 27 times the low-res view. What a layer looks at on one level, the next layer reads
on the level below; no tile is encoded in which nobody reads.
"""

import numpy as np
import torch
from matplotlib.figure import Figure

import flexkit
from flexkit.visual_search import draw_scene, load_model

model, processor = load_model()
picture = np.asarray(draw_scene(0, size=1728).image)
config = flexkit.FlexConfig(start_layer=1, zoom=3, levels=3, policy=flexkit.TopK(2))
model = flexkit.patch_model(flexkit.unpatch_model(model), config, trained=True)
processor = flexkit.FlexProcessor(processor.processor, model)
question = "<image> Which digit is on the object that is yellow?"
inputs = processor(images=flexkit.ArraySource(picture), text=question, return_tensors="pt")
with flexkit.trace(model) as trace, torch.no_grad():
    model(**inputs)
tiles = sum(rows * columns for rows, columns in processor.zooms)
print(f"{trace.steps[0].tiles} of {tiles} tiles were encoded")

# %%
# What the first three layers selected, each on the level below the one before. (The weights were trained on one level:
# of where to look below it they have learnt nothing.)

figure = Figure(figsize=(8, 3), layout="constrained")
for level, panel in enumerate(figure.subplots(1, 3)):
    mask = trace.mask(0, level, level=level)[0].numpy()
    edges = (0, mask.shape[1], mask.shape[0], 0)
    panel.imshow(picture, extent=edges)
    panel.imshow(np.where(mask, np.nan, 0.0), cmap="gray", alpha=0.75, extent=edges, vmin=0, vmax=1)
    panel.set(title=f"{mask.shape[0]} x {mask.shape[1]} tokens: {int(mask.sum())} read", xticks=[], yticks=[])
