"""Answer questions about a folder of pictures, or about those of a table, by Ray Data.

    python examples/batch_ray.py /models/patched photos --question "What is written on the sign?" --output answers
    python examples/batch_ray.py /models/patched table.jsonl --output answers --format parquet --actors 2 --gpus 1

A table is CSV or JSON lines: ``picture``, a path beside the table; ``question``; and, where a row has one of its own,
``policy``, as examples/serve_ray.py takes it. Each row comes back with an ``answer``, or with the ``error`` for which
it has none. Needs ``pip install 'flexkit-vlm[ray]'``.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import ray
from PIL import Image

from flexkit.errors import first_line
from flexkit.integrations.answering import Answerer, PictureQuestion


class Answers:
    """An actor: it loads the model once."""

    def __init__(self, folder: str, max_new_tokens: int) -> None:
        self.answerer = Answerer(folder, max_new_tokens)

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = self.answerer.answer([PictureQuestion(**row) for row in rows.to_pylist()])
        answers = [each if isinstance(each, str) else None for each in found]
        errors = [first_line(each) if isinstance(each, Exception) else None for each in found]
        for name, column in {"answer": answers, "error": errors}.items():
            rows = rows.append_column(name, pa.array(column, pa.string()))
        return rows


def read_rows(source: Path, question: str | None, policy: str | None) -> list[dict[str, str | None]]:
    """All that is asked. A column has one type, and so a policy is JSON."""
    source = source.resolve()
    if source.is_dir():
        endings = Image.registered_extensions()
        table = [{"picture": path} for path in sorted(source.rglob("*")) if path.suffix.lower() in endings]
    else:
        with source.open(newline="", encoding="utf-8") as file:
            table = [*csv.DictReader(file)] if source.suffix == ".csv" else [json.loads(line) for line in file]
    rows = []
    for row in table:
        own = policy if row.get("policy") in (None, "") else row["policy"]
        rows.append(
            {
                "picture": str(source.parent / row["picture"]),
                "question": row.get("question") or question,
                "policy": own if isinstance(own, str) else json.dumps(own),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer, and write a file for each block of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a saved patched model, and its processor")
    parser.add_argument("source", type=Path, help="a folder of pictures, or a table")
    parser.add_argument("--question", help="of pictures that have none of their own")
    parser.add_argument("--policy", help="of questions that have none of their own; default: the model's")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--format", choices=["json", "parquet"], default="json", help="JSON lines by default")
    parser.add_argument("--actors", type=int, default=1, help="models at work; default: %(default)s")
    parser.add_argument("--gpus", type=float, default=0, help="of each; default: %(default)s")
    parser.add_argument("--cpus", type=float, default=1, help="of each; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    options = parser.parse_args(arguments)
    rows = read_rows(options.source, options.question, options.policy)
    if not rows:
        parser.error(f"there is no picture in {options.source}")
    answered = ray.data.from_items(rows).map_batches(
        Answers,
        batch_format="pyarrow",
        fn_constructor_args=(options.folder, options.max_new_tokens),
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=options.cpus,
        num_gpus=options.gpus,
    )
    getattr(answered, f"write_{options.format}")(str(options.output.resolve()))


if __name__ == "__main__":
    main()
