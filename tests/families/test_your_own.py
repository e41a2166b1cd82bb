"""A model that transformers does not know, and what a user writes to have it patched."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import flexkit
from flexkit.patching.geometry import registry

PICTURE, PATCH, CELLS = 90, 4, 3


class SketchConfig(PreTrainedConfig):
    model_type = "sketch"

    def get_text_config(self, *args: object, **kwargs: object) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
        )


class Sketch(PreTrainedModel, GenerationMixin):
    """A language model in front of which a convolution puts pictures, a full stop behind each."""

    config_class = SketchConfig
    _supports_sdpa = True

    def __init__(self, config: SketchConfig) -> None:
        super().__init__(config)
        self.eye = nn.Conv2d(3, 32, PATCH, PATCH)
        self.full_stop = nn.Parameter(torch.randn(32))
        self.writer = LlamaModel(config.get_text_config())
        self.head = nn.Linear(32, 96)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.writer.embed_tokens

    def look(self, sketch: Tensor) -> Tensor:
        return self.eye(sketch).flatten(2).mT

    def forward(
        self,
        input_ids: Tensor,
        sketch: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        states = self.writer.embed_tokens(input_ids)
        if sketch is not None and (input_ids == PICTURE).any():
            seen = torch.cat([self.look(sketch), self.full_stop.expand(len(sketch), 1, -1)], dim=1)
            states = states.masked_scatter((input_ids == PICTURE)[..., None], seen)
        output = self.writer(
            inputs_embeds=states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            logits=self.head(output.last_hidden_state), past_key_values=output.past_key_values
        )


# What follows is all that a user writes.


class SketchGeometry(flexkit.Geometry):
    """Square pictures of one size; a full stop behind the cells; a convolution that takes any size."""

    inputs = ("sketch",)
    default_zoom = 2

    def grids(self, model, inputs, zoom):  # type: ignore[no-untyped-def]
        return [(CELLS, CELLS)] * len(inputs["sketch"])

    def encode(self, model, inputs, grids, zoom):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return list(model.look(inputs["sketch"]))

    def layout(self, model, grid):  # type: ignore[no-untyped-def]
        return torch.arange(grid[0] * grid[1] + 1) < grid[0] * grid[1]

    def decoder(self, model):  # type: ignore[no-untyped-def]
        return model.writer

    def image_tokens(self, model, input_ids, inputs_embeds):  # type: ignore[no-untyped-def]
        return input_ids == PICTURE


# To here.


@pytest.fixture
def sketch() -> Iterator[Sketch]:
    torch.manual_seed(0)
    model = Sketch(SketchConfig()).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    flexkit.register_geometry("sketch", SketchGeometry())
    yield model
    del registry._registered["sketch"]


def inputs_of(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 80, (rows, 16))
    ids[:, 2:12] = PICTURE
    pixels = torch.randn(rows, 3, 2 * CELLS * PATCH, 2 * CELLS * PATCH).double()
    return {"input_ids": ids, "sketch": nn.functional.avg_pool2d(pixels, 2), "hd_sketch": pixels}


def test_a_model_of_your_own(sketch: Sketch) -> None:
    assert "sketch" in flexkit.supported_models()
    inputs = inputs_of()
    base = {name: value for name, value in inputs.items() if not name.startswith("hd_")}
    with torch.no_grad():
        expected = sketch(**base).logits
        flexkit.patch_model(sketch, flexkit.FlexConfig(policy=flexkit.Nothing()), trained=True)
        assert torch.equal(sketch(**inputs).logits, expected)
        flexkit.unpatch_model(sketch)
        flexkit.patch_model(sketch, flexkit.FlexConfig(policy=flexkit.TopK(3)), trained=True)
        assert not torch.equal(sketch(**inputs).logits, expected)
        together = sketch.generate(**inputs, max_new_tokens=4, do_sample=False)
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            assert torch.equal(sketch.generate(**alone, max_new_tokens=4, do_sample=False)[0], together[row])
        flexkit.unpatch_model(sketch)
        assert torch.equal(sketch(**base).logits, expected)


def test_before_it_is_registered() -> None:
    with pytest.raises(flexkit.UnsupportedModelError, match=r"'sketch'.*register_geometry adds one"):
        flexkit.patch_model(Sketch(SketchConfig()))
    with pytest.raises(flexkit.ConfigError, match="must be an instance of flexkit"):
        flexkit.register_geometry("sketch", SketchGeometry)  # type: ignore[arg-type]
