"""Code in a saved folder, by which transformers loads it with both views: ``trust_remote_code=True``."""

from pathlib import Path

__all__ = ["MODEL", "PROCESSOR", "write_code"]

MODEL, PROCESSOR = "modeling_flexkit", "processing_flexkit"
"""Names of the files, without their ending."""

_CODE = '''"""What transformers runs where this folder is loaded with trust_remote_code=True."""

try:
    from {module} import {name}
except ImportError as error:
    raise ImportError(
        "this folder was saved by flexkit, which cannot be imported: pip install flexkit-vlm. "
        "Without trust_remote_code=True it is loaded as the base model, which has one view only."
    ) from error

__all__ = ["{name}"]
'''


def write_code(folder: Path, file: str, loader: str) -> str:
    """Write a file that imports a class of flexkit with a ``from_pretrained``.

    Parameters
    ----------
    folder : pathlib.Path
        Where the model, or the processor, is saved.
    file : str
        :data:`MODEL` or :data:`PROCESSOR`.
    loader : str
        The class and where it is public, for the folder may be read by any later version.

    Returns
    -------
    str
        How an ``auto_map`` names the class.
    """
    module, _, name = loader.rpartition(".")
    (folder / f"{file}.py").write_text(_CODE.format(module=module, name=name), encoding="utf-8")
    return f"{file}.{name}"
