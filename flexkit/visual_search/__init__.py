"""A visual search in the manner of V* Bench: large scenes, tiny details, a question about one of them."""

from flexkit.visual_search.clip import Clip, draw_clip
from flexkit.visual_search.items import Item
from flexkit.visual_search.questions import TRACKS, Question, questions
from flexkit.visual_search.scene import Scene, draw_scene
from flexkit.visual_search.weights import load_model

__all__ = ["TRACKS", "Clip", "Item", "Question", "Scene", "draw_clip", "draw_scene", "load_model", "questions"]
