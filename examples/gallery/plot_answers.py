"""
Asking with and without a closer look
=====================================

The same model, with its high-res view and without, is asked for digits (which its low-res view has lost) and for rows
(which it has not).
"""

import torch
from matplotlib.figure import Figure

import flexkit
from flexkit.visual_search import draw_scene, load_model

model, processor = load_model()
scene = draw_scene(0, 400)
questions = [
    f"<image> {words} the object that is {colour}?"
    for colour in ("yellow", "green", "cyan")
    for words in ("Which digit is on", "In which row is")
]


@torch.no_grad()
def ask(question: str) -> str:
    """The next word."""
    inputs = processor(images=scene.image, text=question, return_tensors="pt")
    return processor.decode(model(**inputs).logits[0, -1].argmax()).strip()


for question in questions:
    closer = ask(question)
    with flexkit.disabled(model):
        plain = ask(question)
    print(f"{question.removeprefix('<image> '):45s} low-res view: {plain:3s} closer: {closer}")

# %%
# What the two views show of the picture:

figure = Figure(figsize=(7, 3.6), layout="constrained")
for panel, name, side in zip(figure.subplots(1, 2), ("low-res view", "high-res view"), (64, 192), strict=True):
    panel.imshow(processor.shown(scene.image).resize((side, side)))
    panel.set(title=f"{name}, {side} px", xticks=[], yticks=[])
