"""The support matrix of the docs is what the tests of families found; a run of all of them holds the two together."""

import csv
import io
import os
from collections import defaultdict
from pathlib import Path

import pytest

MATRIX = Path(__file__).parents[1] / "docs" / "support.csv"
COLUMNS = (
    "model type",
    "patched",
    "image tokens",
    "read in",
    "added",
    "equal to full attention",
    "own states",
    "videos",
    "processor",
)


class Matrix:
    """Collects the facts of each model type, and checks or writes the table when they are complete."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            facts = dict(report.user_properties)
            name = facts.pop("model type", None)
            if name is not None:
                self.rows[str(name)] |= {key: str(value) for key, value in facts.items()}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.rows or any(len(row) < len(COLUMNS) - 1 for row in self.rows.values()):
            return
        file = io.StringIO()
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({"model type": name} | self.rows[name] for name in sorted(self.rows))
        if os.environ.get("WRITE_MATRIX"):
            MATRIX.write_text(file.getvalue())
        # Some tests alone, or an older transformers, say nothing of some types.
        elif _listed() <= set(self.rows) and MATRIX.read_text() != file.getvalue():
            print("\ndocs/support.csv is not what the tests found: run `make matrix` and look at the difference.")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _listed() -> set[str]:
    with MATRIX.open() as file:
        return {row["model type"] for row in csv.DictReader(file)}
