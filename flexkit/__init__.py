"""A second, high-resolution view for vision-language models, read only where they look."""

from importlib.metadata import version

from flexkit import interrupts  # noqa: F401 - first: all others take seconds to import
from flexkit.accounting import Cost, cost
from flexkit.attention import HierarchicalAttentionOutput, HierarchicalSelfAttention
from flexkit.checkpoints import (
    BaseModelWarning,
    from_pretrained,
    load_flex,
    load_llava_flexattn,
    load_llava_flexattn_processor,
    save_flex,
)
from flexkit.encoding import (
    ArraySource,
    DualResolutionEncoder,
    DualResolutionOutput,
    FrameArray,
    FramePictures,
    FrameSource,
    PictureSource,
    TileSource,
    TileView,
    VideoFile,
    open_tiff,
    open_video,
)
from flexkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FlexkitError,
    HighResInputError,
    PatchError,
    PolicyError,
    UnsupportedModelError,
)
from flexkit.patching import (
    FeatureDriftWarning,
    FlexConfig,
    Geometry,
    UntrainedProjectionsWarning,
    disabled,
    flex_parameters,
    is_patched,
    patch_model,
    register_geometry,
    set_alpha,
    set_policy,
    supported_models,
    unpatch_model,
    using_policy,
)
from flexkit.probing import LayerProbe, probe_start_layer
from flexkit.processing import FlexProcessor, SmallImageWarning
from flexkit.selection import AttentionMapSelector, Policy, Schedule
from flexkit.selection.policies import *  # noqa: F403 - one list of them, and no line for each here
from flexkit.selection.policies import __all__ as __all__
from flexkit.tracing import Trace, trace
from flexkit.viz import animate_selection, plot_selection, selection_page

__version__ = version("flexkit-vlm")

__all__ += (
    "ArraySource",
    "AttentionMapSelector",
    "BaseModelWarning",
    "CheckpointError",
    "ConfigError",
    "Cost",
    "DataError",
    "DualResolutionEncoder",
    "DualResolutionOutput",
    "FeatureDriftWarning",
    "FlexConfig",
    "FlexProcessor",
    "FlexkitError",
    "FrameArray",
    "FramePictures",
    "FrameSource",
    "Geometry",
    "HierarchicalAttentionOutput",
    "HierarchicalSelfAttention",
    "HighResInputError",
    "LayerProbe",
    "PatchError",
    "PictureSource",
    "Policy",
    "PolicyError",
    "Schedule",
    "SmallImageWarning",
    "TileSource",
    "TileView",
    "Trace",
    "UnsupportedModelError",
    "UntrainedProjectionsWarning",
    "VideoFile",
    "animate_selection",
    "cost",
    "disabled",
    "flex_parameters",
    "from_pretrained",
    "is_patched",
    "load_flex",
    "load_llava_flexattn",
    "load_llava_flexattn_processor",
    "open_tiff",
    "open_video",
    "patch_model",
    "plot_selection",
    "probe_start_layer",
    "register_geometry",
    "save_flex",
    "selection_page",
    "set_alpha",
    "set_policy",
    "supported_models",
    "trace",
    "unpatch_model",
    "using_policy",
)
