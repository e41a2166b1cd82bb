"""Train only what flexkit adds to a model, with the Trainer of transformers, on what only the high-res view shows.

Every picture is striped, so finely that its low-res view is grey all over. The model, a small LLaVA that has never
seen any and stays as it is, is asked which way the stripes run. Needs ``pip install 'flexkit-vlm[train]'``.

    python examples/train_projections.py
"""

import tempfile
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainingArguments

import flexkit
from flexkit.training import AlphaRamp
from flexkit.visual_search import load_model

ANSWERS = ("row", "column")
Example = dict[str, Any]

# --- The data -------------------------------------------------------------------------------------------------------


def striped(answer: str, size: int = 192) -> Image.Image:
    """A picture whose rows, or columns, are light and dark by turns, in a tint of its own."""
    light = (np.arange(size) % 2)[:, None].repeat(size, axis=1)
    light = light if answer == "row" else light.T
    tint = np.random.uniform(0.6, 1.0, size=3)
    return Image.fromarray((255 * light[..., None] * tint).astype(np.uint8))


def draw(count: int) -> list[Example]:
    """Pictures with their answers, both equally often."""
    return [{"image": striped(answer), "answer": answer} for answer in ANSWERS * (count // 2)]


class Collator:
    """Turn examples into the inputs of both views, with labels for the answer alone."""

    def __init__(self, processor: flexkit.FlexProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        inputs = self.processor(
            images=[example["image"] for example in examples],
            text=[f"<image> Is each stripe a row or a column? {example['answer']}" for example in examples],
            return_tensors="pt",
        )
        labels = inputs["input_ids"].clone()
        labels[:, :-1] = -100
        return {**inputs, "labels": labels}


# --- Training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: Any, collator: Collator, count: int = 10) -> float:
    """How often new pictures are answered rightly; with labels given, the positions that predict them read."""
    batch = collator(draw(count))
    return (model.eval()(**batch).logits[:, -2].argmax(-1) == batch["labels"][:, -1]).float().mean().item()


def main(steps: int = 12, batch: int = 4) -> list[float]:
    """Train, print what came of it, and return the losses."""
    np.random.seed(0)
    model, processor = load_model("base")
    flexkit.patch_model(model, flexkit.FlexConfig.published(start_layer=1), trained=True)  # they soon will be
    collator = Collator(flexkit.FlexProcessor(processor, model))

    model.requires_grad_(False)
    for parameter in flexkit.flex_parameters(model):
        parameter.requires_grad_(True)
    # With LoRA beside them: peft.get_peft_model(model, LoraConfig(..., modules_to_save=["k_proj_hd", "v_proj_hd"])).
    # Reentrant gradient checkpointing of a frozen model asks for model.enable_input_require_grads().

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            remove_unused_columns=False,  # the collator reads the image and the answer
            logging_steps=1,
            save_strategy="no",  # checkpoints would hold what was added in a file of its own, and resume from it
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=draw(64), data_collator=collator, callbacks=[AlphaRamp()])
        trainer.train()

        flexkit.save_flex(model, folder)  # a small file: all that was trained
        loaded = flexkit.load_flex(load_model("base")[0], folder)
    print(f"answered rightly: {accuracy(model, collator):.2f}, loaded again: {accuracy(loaded, collator):.2f}")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
