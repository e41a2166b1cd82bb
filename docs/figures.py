"""Figures of the gallery's scripts: whatever a script holds, drawn by pyplot or not."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def _get_sg_image_scraper() -> Any:
    return _figures


def _figures(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the figures that a block of a script has made."""
    paths = []
    for figure in block_vars["example_globals"].values():
        if isinstance(figure, Figure) and not hasattr(figure, "shown_in_gallery"):
            paths.append(next(block_vars["image_path_iterator"]))
            figure.savefig(paths[-1], dpi=110)
            figure.shown_in_gallery = True  # type: ignore[attr-defined]
    return str(figure_rst(paths, gallery_conf["src_dir"]))
