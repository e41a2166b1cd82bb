"""Every error that flexkit raises on purpose.

All derive from :class:`FlexkitError`, which is a :class:`ValueError`: one ``except`` clause catches them all.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FlexkitError",
    "HighResInputError",
    "PatchError",
    "PolicyError",
    "UnsupportedModelError",
]


class FlexkitError(ValueError):
    """Base class of all errors raised by flexkit."""


class ConfigError(FlexkitError):
    """A setting is out of range, or two settings contradict each other."""


class DataError(FlexkitError):
    """A sample that is to be trained on cannot be read, or does not fit; the message names it."""


class PolicyError(FlexkitError):
    """A selection policy has bad parameters or returned something that is not a mask of the grid."""


class UnsupportedModelError(FlexkitError):
    """A model lacks something that patching needs; the message names what is missing."""


class PatchError(FlexkitError):
    """A model is patched where it must not be, or is not patched where it must be."""


class HighResInputError(FlexkitError):
    """High-resolution inputs do not fit the images of the prompt, or hold values that cannot be used."""


class CheckpointError(FlexkitError):
    """A checkpoint is incomplete, has tensors too many or of wrong shapes, or cannot be read safely."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, in its first line; its class, if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
