"""A processor of both views in a folder of transformers, or on the hub: the model's own, and the zoom."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, ProcessorMixin

from flexkit.errors import CheckpointError
from flexkit.grids import Grid
from flexkit.remote_code import PROCESSOR, write_code

__all__ = ["load", "save"]

_FILE, _KEY = "processor_config.json", "high_res"


def save(processor: Any, zoom: Grid, levels: int, folder: str | PathLike[str], **kwargs: Any) -> Any:
    """Save a model's processor, so that transformers loads a FlexProcessor; returns what transformers does."""
    files = processor.save_pretrained(folder, **kwargs)
    path = Path(folder, _FILE)
    settings = json.loads(path.read_text(encoding="utf-8"))
    code = {"AutoProcessor": write_code(Path(folder), PROCESSOR, "flexkit.FlexProcessor")}
    settings |= {"auto_map": settings.get("auto_map", {}) | code, _KEY: {"zoom": list(zoom), "levels": levels}}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def load(name: str | PathLike[str], **kwargs: Any) -> tuple[Any, Grid, int]:
    """The model's processor, the zoom and the levels that :func:`save` wrote.

    Raises
    ------
    CheckpointError
        If they are not there.
    """
    saved = ProcessorMixin.get_processor_dict(name, **kwargs)[0].get(_KEY)
    match saved:
        case {"zoom": [int(), int(), *_] as zoom, "levels": int(levels)}:
            return AutoProcessor.from_pretrained(name, **kwargs | {"trust_remote_code": False}), tuple(zoom), levels
    raise CheckpointError(
        f"{_FILE} of {name} says {saved!r} of a {_KEY} view: a FlexProcessor that is saved there writes its zoom and "
        "levels. Make one of the processor that is there, flexkit.FlexProcessor(AutoProcessor.from_pretrained(name), "
        "model)."
    )
