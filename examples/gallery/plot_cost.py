"""
What a sharper view costs
=========================

Operations of LLaVA-1.5-7B for one question of 60 tokens and five tokens of answer, counted on the meta device without
weights: the low-res view alone, a base model that sees a little more, flexkit reading a tenth, recomputing as the
published code does, and all high-res tokens in the sequence.
"""

from matplotlib.figure import Figure

import flexkit

question = {"prompt": 60, "new_tokens": 5, "selected": 0.1}
costs = flexkit.cost("llava-1.5-7b", 1008, **question)
costs["larger"] = flexkit.cost("llava-1.5-7b", low_res_size=448, **question)["low_res"]
names = {
    "low_res": "low-res view only, 336 px",
    "larger": "a base model at 448 px",
    "flexkit_on_demand": "flexkit, tiles on demand",
    "flexkit": "flexkit, all tiles encoded",
    "recompute": "as published: K', V' anew at every step",
    "all_in_sequence": "all high-res tokens in the sequence",
}
for way, name in names.items():
    print(f"{name:42s} {costs[way].tflops:6.1f} TFLOP  {costs[way].image_tokens:5d} image tokens")

# %%

figure = Figure(figsize=(7.4, 2.8), layout="constrained")
panel = figure.subplots()
bars = panel.barh(list(names.values()), [costs[way].tflops for way in names], color="#0072B2")
panel.bar_label(bars, fmt="%.1f", padding=3)
panel.invert_yaxis()
panel.set(xlabel="TFLOP for one answer", xlim=(0, 1.12 * costs["all_in_sequence"].tflops))
panel.spines[["top", "right"]].set_visible(False)
