"""What the studies have in common: what they take, and where they write."""

import argparse
import json
from pathlib import Path
from typing import Any


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of what every study takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="that `flexkit train` wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1_000_003, help="of the scenes")
    parser.add_argument("--questions", type=int, default=1000)
    return parser


def write(path: Path, content: dict[str, Any]) -> None:
    """Write what a study found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
