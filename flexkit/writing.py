"""Files that cannot be written, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

from flexkit.errors import ConfigError

__all__ = ["writing"]


@contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
    """Name the file or folder that is being written, where that fails.

    Parameters
    ----------
    path : str or os.PathLike
        Of the file or folder.

    Raises
    ------
    ConfigError
        In the place of an :class:`OSError`.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error}") from error
