"""The model card of a patched model: how it is loaded, and what else loads."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

__all__ = ["CARD", "describe"]

CARD = "README.md"

_SECTION = """## High-resolution view

This model was patched by flexkit (`pip install flexkit-vlm`): it keeps its low-resolution image tokens and reads
high-resolution ones where its own attention looks.

```python
import flexkit

model = flexkit.from_pretrained(name)  # this folder or repository
processor = flexkit.FlexProcessor.from_pretrained(name)
```

`AutoModelForImageTextToText` and `AutoProcessor` of transformers load the same with `trust_remote_code=True`, where
flexkit is installed. **Without it, and in engines that do not know flexkit, this is the base model:** `flexkit.weights`
and `flexkit.json` are ignored, and it answers from the low-resolution view alone.
"""


def describe(path: Path, config: Any) -> None:
    """Write a model card, or add to the one that is there, unless it speaks of flexkit already.

    Parameters
    ----------
    path : pathlib.Path
        Of the card.
    config : transformers.PreTrainedConfig
        Of the model; a base model on the hub that it names is named.
    """
    if path.exists():
        card: Any = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        if "flexkit" in card.text:
            return
    else:
        card = ModelCard("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n")
        card.data.base_model = _repository(config)
    card.data.tags = [*(card.data.tags or ()), "flexkit"]
    card.text = f"{card.text.rstrip()}\n\n{_SECTION}".lstrip()
    card.save(path)


def _repository(config: Any) -> str | None:
    name = getattr(config, "_name_or_path", "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not Path(name).exists() else None
