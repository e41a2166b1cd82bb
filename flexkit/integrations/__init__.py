"""flexkit as a guest of other engines."""

from typing import Any

__all__ = ["lmms_eval_models"]


def lmms_eval_models() -> Any:
    """What lmms-eval is told of the model ``flexkit``, by the entry point in pyproject.toml.

    Returns
    -------
    lmms_eval.models.registry_v2.ModelManifest
        Nothing of the model itself is imported: lmms-eval asks every guest, whichever model it is to run.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("flexkit", chat_class_path="flexkit.integrations.lmms_eval.FlexkitModel")
