"""Intersphinx inventories made from `inventories.txt`.

The docs build without a network, and their links still lead to the pages of the other projects.
"""

import zlib
from pathlib import Path

HEADER = "# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The rest is compressed with zlib.\n"


def write_inventories(listing: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Write one inventory per project of the listing; return the `intersphinx_mapping` that uses them."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for block in listing.read_text(encoding="utf-8").strip().split("\n\n"):
        head, *objects = (line for line in block.splitlines() if not line.startswith("#"))
        name, url = head.split()
        path = folder / f"{name}.inv"
        path.write_bytes(HEADER.format(name=name).encode() + zlib.compress(_entries(objects).encode()))
        mapping[name] = (url, str(path))
    return mapping


def _entries(lines: list[str]) -> str:
    """Turn lines `role page object ...` into inventory entries; `$` in a page stands for the object."""
    entries = []
    for line in lines:
        role, page, *names = line.split()
        for name in (name.replace("_", " ") if role == "std:term" else name for name in names):
            anchor = name.replace(" ", "-") if role == "std:term" else name
            entries.append(f"{name} {role} 1 {page.replace('$', anchor)} -\n")
    return "".join(entries)
