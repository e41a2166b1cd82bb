"""The processes that ``accelerate launch`` started, or the only one."""

import torch
from accelerate import PartialState

__all__ = ["processes"]


def processes() -> PartialState:
    """The state that all processes share.

    Where there is no accelerator, accelerate has to be told so, or each process takes itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
