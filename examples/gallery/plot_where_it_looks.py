"""
Where a model looks
===================

The digits of this picture are lost in the model's low-res view, 64 pixels a side. Its attention finds the object that
is asked for, and the layers behind read that place in high resolution.
"""

import torch

import flexkit
from flexkit.visual_search import draw_scene, load_model

model, processor = load_model()
image = draw_scene(0, 400).image
question = "<image> Which digit is on the object that is yellow?"
inputs = processor(images=image, text=question, return_tensors="pt")

with flexkit.trace(model) as trace, torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=1)
words = [processor.decode(token) for token in output[0, inputs["input_ids"].shape[1] :]]
print("answer:", *words)

# %%
# One panel a layer. What was selected has the picture's own colours and a rim; elsewhere the picture is grey, coloured
# by the attention that was selected by. The map of one layer says what the next one reads; nothing reads by the last.

figure = flexkit.plot_selection(trace, processor.shown(image), words=words)

# %%
# Another question about the same picture, another place:

other = processor(images=image, text=question.replace("yellow", "green"), return_tensors="pt")
with flexkit.trace(model) as trace, torch.no_grad():
    output = model.generate(**other, max_new_tokens=1)
print("answer:", processor.decode(output[0, -1]))
again = flexkit.plot_selection(trace, processor.shown(image))
