"""Pictures of what a model looked at."""

from flexkit.viz.animation import animate_selection
from flexkit.viz.page import selection_page
from flexkit.viz.plot import plot_selection

__all__ = ["animate_selection", "plot_selection", "selection_page"]
