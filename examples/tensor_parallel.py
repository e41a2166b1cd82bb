"""Ask a patched model whose heads are shared out among processes, each with a GPU of its own, or all on the CPU.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import os
import tempfile

import torch
import torch.distributed as dist

import flexkit
from flexkit.visual_search import draw_scene, load_model


@torch.no_grad()
def main(seed: int = 3) -> None:
    """Save the small model that ships, load it in every process, and ask all of them the same."""
    scene = draw_scene(seed)
    item = next(item for item in scene.items if sum(other.colour == item.colour for other in scene.items) == 1)
    question = f"Which digit is on the object that is {item.colour}?"
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load_model()
        model.save_pretrained(folder)
        model = flexkit.from_pretrained(folder, tp_plan="auto")
    inputs = processor(images=scene.image, text=f"<image> {question}", return_tensors="pt").to(model.device)
    words = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    if int(os.environ.get("RANK", 0)) == 0:
        shares = "1 process" if model.tp_size is None else f"{model.tp_size} processes"
        answer = processor.decode(words, skip_special_tokens=True)
        print(f"{question} {shares}: {answer} (It is {item.digit}.)")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
