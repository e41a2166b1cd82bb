"""The CLIP vision tower that a published checkpoint was made with and may leave out."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from flexkit.checkpoints.files import checked_folder, read_json
from flexkit.errors import CheckpointError

__all__ = ["vision_settings", "vision_weights"]


def vision_settings(source: CLIPVisionConfig | Mapping[str, Any] | str | PathLike[str]) -> CLIPVisionConfig:
    """Configuration of a CLIP vision tower.

    Parameters
    ----------
    source : transformers.CLIPVisionConfig, mapping, str or os.PathLike
        A configuration, also of a whole CLIP; the same as plain JSON; or a folder or hub name.

    Raises
    ------
    CheckpointError
        If it cannot be read or is not CLIP's.
    """
    if isinstance(source, CLIPConfig):
        return source.vision_config
    if isinstance(source, CLIPVisionConfig):
        return source
    try:
        if isinstance(source, str | PathLike) and Path(source).is_dir():
            source = read_json(Path(source), "config.json")
        if isinstance(source, Mapping):
            return CLIPVisionConfig.from_dict(dict(source.get("vision_config", source)))
        if isinstance(source, str | PathLike):
            return CLIPVisionConfig.from_pretrained(source)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"the configuration of the vision tower {source!r} cannot be read ({' '.join(str(error).split())}); pass "
            "vision_config=, the configuration or folder of the CLIP that the checkpoint was made with."
        ) from error
    raise CheckpointError(
        f"vision_config has to be a CLIPVisionConfig, a dict or a folder, got {type(source).__name__}."
    )


def vision_weights(tower: str | PathLike[str]) -> dict[str, Tensor]:
    """Weights of a CLIP vision tower.

    Parameters
    ----------
    tower : str or os.PathLike
        Folder or hub name.

    Raises
    ------
    CheckpointError
        If it cannot be read from safetensors, or is not CLIP's.
    """
    if Path(tower).is_dir():
        checked_folder(tower)
    try:
        vision, report = CLIPVisionModel.from_pretrained(tower, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint has no vision weights and its vision tower {str(tower)!r} cannot be loaded "
            f"({error}); pass vision_config=, the folder of the CLIP that it was made with."
        ) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:4])
        raise CheckpointError(f"the vision tower {str(tower)!r} lacks weights: {missing}; is it a CLIP?")
    weights: dict[str, Tensor] = vision.state_dict()
    return weights
