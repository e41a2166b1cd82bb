"""Vision encoder-decoders made of other parts than those of the zoo."""

from dataclasses import replace
from typing import Any

import pytest

from tests.families.test_context import test_everything_selected_is_a_longer_context as equals_a_longer_context
from tests.families.test_context import test_features_are_what_keys_are_made_of as features_are_of_cells
from tests.zoo import CONTEXT
from tests.zoo.encoder_decoder import BERT, SWIN, VIT, vision_encoder_decoder
from tests.zoo.pixels import picture
from tests.zoo.tiny import BART

FAMILY = CONTEXT["vision-encoder-decoder"]


@pytest.mark.parametrize("encoder", ["beit", "deit", "dinov2", "swin", "swinv2"])
def test_encoders(encoder: str) -> None:
    shifted = "swin" in encoder
    parts = {**(SWIN if shifted else VIT), "model_type": encoder}
    family = replace(
        FAMILY,
        config=lambda: vision_encoder_decoder(parts, BERT),
        high_res=picture(32, 48) if shifted else picture(42, 42),
        grid=(2, 3) if shifted else (3, 3),
    )
    features_are_of_cells(family)


@pytest.mark.parametrize("decoder", ["bart", "roberta", "xlm-roberta"])
def test_decoders(decoder: str, fact: Any) -> None:
    parts = {**(BART if decoder == "bart" else BERT), "model_type": decoder}
    family = replace(FAMILY, name=decoder, config=lambda: vision_encoder_decoder(VIT, parts))
    equals_a_longer_context(family, fact)
