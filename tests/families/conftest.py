"""The support matrix of the docs is what the tests of this folder found; a whole run of them holds the two together."""

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

MATRIX = Path(__file__).parents[2] / "docs" / "support.csv"
COLUMNS = ("model type", "patched", "image tokens", "read in", "added", "equal to full attention")


class Matrix:
    """Collects what the tests say of each model type, and writes or checks the table when all of them have run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rows: dict[str, dict[str, str]] = defaultdict(dict)
        self.complete = not (config.option.keyword or config.option.lf or config.option.maxfail)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            facts = dict(report.user_properties)
            name = facts.pop("model type", None)
            if name is not None:
                self.rows[str(name)] |= {key: str(value) for key, value in facts.items()}
        self.complete &= not report.failed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.rows or not self.complete:
            return
        file = io.StringIO()
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"model type": name} | self.rows[name] for name in sorted(self.rows))
        if self.config.option.write_matrix:
            MATRIX.write_text(file.getvalue())
        elif MATRIX.read_text() != file.getvalue():
            print("\ndocs/support.csv is not what the tests found: run `make matrix` and look at the difference.")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Matrix(config), "matrix")


@pytest.fixture
def fact(record_property: Any, request: pytest.FixtureRequest) -> Any:
    """A function that notes a fact of a model type for the matrix."""

    def note(model_type: str, **facts: str) -> None:
        record_property("model type", model_type)
        for name, value in facts.items():
            record_property(name.replace("_", " "), value)

    return note
