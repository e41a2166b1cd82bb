"""Showing somebody who waits that something is being done."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from tqdm import tqdm

__all__ = ["waiting"]


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show what is being done, and for how long already, on a terminal; to a file or a pipe, nothing.

    Parameters
    ----------
    what : str
        In a word or two.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = Event()
    clock = Thread(target=_show, args=(what, done), daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()


def _show(what: str, done: Event) -> None:
    with tqdm(desc=what, bar_format="{desc} ... {elapsed}", leave=False, delay=1) as bar:
        while not done.wait(0.5):
            bar.refresh()
