"""Training on data of your own: conversations about images, by the Trainer of transformers."""

from flexkit.training.collator import ConversationCollator
from flexkit.training.conversations import Conversation
from flexkit.training.dataset import ConversationDataset
from flexkit.training.ramp import AlphaRamp
from flexkit.training.start_layer import choose_start_layer
from flexkit.training.trainer import train
from flexkit.training.weights import trainable

__all__ = [
    "AlphaRamp",
    "Conversation",
    "ConversationCollator",
    "ConversationDataset",
    "choose_start_layer",
    "train",
    "trainable",
]
