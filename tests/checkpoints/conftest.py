import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A writable copy of a published checkpoint."""
    folder = tmp_path / "published"
    (folder / "vision_tower").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vision_tower/config.json"):
        shutil.copyfile(REFERENCE / "small-wide" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file; None removes one, a dict is merged."""

    def edit(path: Path, **changes: Any) -> None:
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                del content[key]
            elif isinstance(value, dict):
                content[key] = {k: v for k, v in (content[key] | value).items() if v is not None}
            else:
                content[key] = value
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture(scope="session")
def edit_tensors() -> Callable[[Path, Callable[[dict[str, Tensor]], None]], None]:
    """Change the tensors of a safetensors file."""

    def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)

    return edit


@pytest.fixture(scope="session")
def make_llava() -> Callable[..., LlavaForConditionalGeneration]:
    """Tiny LLaVAs: 4 x 4 image tokens, 4 layers; the same seed gives the same weights."""

    def make(seed: int = 0, **text: Any) -> LlavaForConditionalGeneration:
        shape = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
        }
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**shape, num_hidden_layers=2, image_size=56, patch_size=14),
            text_config=LlamaConfig(**shape | {"num_hidden_layers": 4, "vocab_size": 40} | text),
            image_token_index=39,
            image_seq_length=16,
        )
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).eval()

    return make
