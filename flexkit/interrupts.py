"""Ctrl-C in the seconds in which the command ``flexkit`` is still being imported, and ``main`` cannot catch it yet."""

import sys
from pathlib import Path
from types import TracebackType

__all__: list[str] = []


def _is_command() -> bool:
    """Whether this process was started as ``flexkit`` or ``python -m flexkit``; an importer keeps its own hooks."""
    started_as = (getattr(sys, "argv", None) or [""])[0]
    return Path(started_as).stem == "flexkit" or (started_as == "-m" and "flexkit" in sys.orig_argv)


def _without_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):  # which Python then ends the process by, as shells expect it
        sys.__excepthook__(kind, error, where)


if _is_command():
    sys.excepthook = _without_traceback
