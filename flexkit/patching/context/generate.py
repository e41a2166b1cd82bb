"""``generate`` of models whose image stands in a context: some read it before their forward is called, or without."""

from typing import TYPE_CHECKING, Any, cast

from flexkit.patching.call import FlexCall
from flexkit.patching.context.carriers import carried, held_in
from flexkit.patching.context.readers import Reading
from flexkit.patching.forward import take_high_res
from flexkit.patching.generation import EXPAND
from flexkit.patching.memory import cached_length
from flexkit.patching.methods import of_class
from flexkit.patching.state import get_patch
from flexkit.patching.views import check_inputs

if TYPE_CHECKING:
    from flexkit.patching.context.geometry import Context

__all__ = ["expand_inputs", "generate"]


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a patched model: high-res views are read before it begins, and carried until it ends."""
    patch = get_patch(self)
    base = patch.own_method(self, "generate")
    high_res = take_high_res(kwargs)
    if patch.disabled or not high_res:
        return base(*args, **kwargs)
    check_inputs(self, patch, high_res)
    inputs = {name: value for name, value in kwargs.items() if name in self.forward.__signature__.parameters}
    if args or kwargs.get("inputs") is not None:
        inputs.setdefault(self.main_input_name, args[0] if args else kwargs["inputs"])
    context = cast("Context", patch.geometry)
    held = context.hold(self, patch, high_res, inputs)
    with carried(held):
        output = base(*args, **kwargs)
    if isinstance(held, FlexCall):
        held.finish()
    return output


def expand_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``_expand_inputs_for_generation`` of what generates: it sees the whole prompt, and no guesses of what follows."""
    reading = held_in(self)
    if isinstance(reading, Reading):
        # Embeddings that come with ids are what is run; without, the ids may be empty.
        given = (kwargs.get(name) for name in (reading.reader.prefix + "inputs_embeds", "input_ids"))
        reading.prompt = next((each.shape[1] for each in given if each is not None and each.shape[1]), None)
        reading.cached = int(cached_length(kwargs.get("past_key_values")))
    return of_class(self, EXPAND)(*args, **kwargs)
