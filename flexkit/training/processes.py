"""The processes that ``accelerate launch`` started, or the only one; and a folder that they have to themselves."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import PartialState

from flexkit.checkpoints.files import held
from flexkit.errors import ConfigError

__all__ = ["alone", "processes"]


def processes() -> PartialState:
    """The state that all processes share.

    Where there is no accelerator, accelerate has to be told so, or each process takes itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder: two trainings in one would go on from each other's checkpoints; the processes of one are one.

    Parameters
    ----------
    folder : pathlib.Path
        That is written to.

    Raises
    ------
    ConfigError
        If another training writes to it.
    """
    with ExitStack() as stack:
        if processes().is_main_process:
            try:
                stack.enter_context(held(folder, wait=False))
            except BlockingIOError as error:
                raise ConfigError(
                    f"another training is writing to {str(folder)!r}: wait for its end, or give another folder."
                ) from error
        yield
