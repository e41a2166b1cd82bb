"""Somebody at a terminal sees that something is being done; a file or a pipe gets nothing."""

import io
import time

import pytest

from flexkit.commands.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "seconds", "shown"), [(Terminal, 1.8, True), (Terminal, 0, False), (io.StringIO, 1.8, False)]
)
def test_what_is_shown(stream: type[io.StringIO], seconds: float, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = stream()
    monkeypatch.setattr("sys.stderr", errors)
    with waiting("counting sheep"):
        time.sleep(seconds)
    assert ("counting sheep ... 00:01" in errors.getvalue()) == shown
    assert bool(errors.getvalue().strip()) == shown


def test_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(ZeroDivisionError), waiting("dividing"):
        raise ZeroDivisionError
