"""A model's config as its patched attention modules see it."""

from typing import Any

__all__ = ["CALL", "NAME", "PROMPT", "divert", "restore"]

NAME = "flexkit"
"""Name under which the attention function is registered."""
CALL = "flexkit_call"
"""Name of the keyword argument that carries a :class:`~flexkit.patching.call.call.FlexCall` through the model."""
PROMPT = "flexkit_prompt"
"""Name of the one that carries a :class:`~flexkit.patching.call.route.Prompt` from ``generate`` to each forward."""


class _Name(str):
    """The name of flexkit's attention function, which also answers to that of the model's own kernel."""

    own: str

    def __new__(cls, own: str) -> "_Name":
        name = super().__new__(cls, NAME)
        name.own = own
        return name

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or self.own == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class _ConfigView:
    """A config that is the same, but for the attention function, and that knows which layer looks at it.

    Each patched module gets a view of its own in place of its config, so the config itself, which other modules, other
    models and the masks depend on, is never touched, and a later change of it is seen here.
    """

    def __init__(self, config: Any, layer: int) -> None:
        self.__dict__.update(viewed=config, layer=layer)

    _attn_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        # Dunder names are looked up by copy and pickle before there is anything to view.
        if name.startswith("__") or "viewed" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.viewed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.viewed, name, value)


class _SparseConfigView(_ConfigView):
    """For sparse attention, which asks which kernel it has before it hands that a mask or indices."""

    @property
    def _attn_implementation(self) -> str:  # type: ignore[override]
        return _Name(self.viewed._attn_implementation)


def divert(attention: Any, layer: int) -> None:
    """Let an attention module run through flexkit, as the layer of this index."""
    view = _SparseConfigView if hasattr(attention, "indexer") else _ConfigView
    attention.config = view(attention.config, layer)


def restore(attention: Any) -> None:
    """Give an attention module its own config back, if it was taken."""
    if isinstance(getattr(attention, "config", None), _ConfigView):
        attention.config = attention.config.viewed
