"""Patched models in the folders of transformers: the base model's files, and what was added beside them."""

import copy
import inspect
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel

from flexkit.checkpoints.base_loads import loading_the_base
from flexkit.checkpoints.card import CARD, describe
from flexkit.checkpoints.flex import (
    SETTINGS,
    WEIGHTS,
    AnyPolicy,
    flex_draft,
    flex_folder,
    load_flex,
    read_flex,
    weights_file,
)
from flexkit.checkpoints.hub import HubOptions
from flexkit.checkpoints.tensors import check_tensors
from flexkit.errors import CheckpointError, FlexkitError, first_line
from flexkit.patching import added_parameters
from flexkit.remote_code import MODEL, write_code

__all__ = [
    "PatchedModel",
    "from_pretrained",
    "load_as_saved",
    "load_state_dict",
    "save_pretrained",
    "upload_modified_files",
]

# transformers serve asks for the second.
_AUTO_CLASSES = "AutoModelForImageTextToText", "AutoModelForMultimodalLM"


def from_pretrained(name: str | PathLike[str], *, policy: AnyPolicy | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a patched model that ``model.save_pretrained`` or ``model.push_to_hub`` saved.

    The same as ``AutoModelForImageTextToText.from_pretrained`` and then :func:`flexkit.load_flex`, or as the former
    with ``trust_remote_code=True``.

    Parameters
    ----------
    name : str or os.PathLike
        A folder, or a repository on the Hugging Face hub.
    policy : Policy or callable or Schedule, optional
        Takes the place of the saved policy. Needed if that is not one of flexkit's own.
    **kwargs
        Of ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ``revision``, ``token``,
        ``cache_dir``, ``subfolder``, ``local_files_only`` and others.

    Returns
    -------
    transformers.PreTrainedModel
        Patched, in eval mode.

    Raises
    ------
    CheckpointError
        If nothing that flexkit saved is there, or it does not fit.
    """
    hub: Any = {option: kwargs[option] for option in HubOptions.__annotations__ if option in kwargs}
    folder = flex_folder(name, **hub)
    if not (folder / SETTINGS).exists():
        raise CheckpointError(
            f"{folder} has no {SETTINGS}: nothing there was patched by flexkit. Load the model with transformers and "
            "give it to flexkit.patch_model."
        )
    with loading_the_base():
        loaded = AutoModelForImageTextToText.from_pretrained(name, **kwargs)
    if isinstance(loaded, tuple):  # output_loading_info=True
        return load_flex(loaded[0], folder, policy=policy), *loaded[1:]
    return load_flex(loaded, folder, policy=policy)


def load_as_saved(name: str | PathLike[str], **kwargs: Any) -> tuple[Any, Any]:
    """A patched model, as :func:`from_pretrained` loads it, where one was saved, else a base model; and its processor.

    Raises
    ------
    CheckpointError
        If either cannot be loaded.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        code = (config.get("auto_map") or {}).values()
        patched = any(each.startswith(f"{MODEL}.") for each in code) or Path(name, SETTINGS).is_file()  # of before
        load = from_pretrained if patched else AutoModelForImageTextToText.from_pretrained
        return load(name, **kwargs), AutoProcessor.from_pretrained(name)
    except FlexkitError:
        raise
    except Exception as error:  # a stranger's files, read by the code of any family
        said = first_line(error)
        if isinstance(error, ImportError):  # what is missing, and instructions that go on for many lines
            said = said.partition(". ")[0]
        raise CheckpointError(f"{str(name)!r} cannot be loaded: {said}") from error


class PatchedModel:
    """What transformers' Auto classes take for the class of a patched model, by the ``auto_map`` of its folder.

    What is loaded keeps the class that it had.
    """

    @staticmethod
    def from_pretrained(name: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """Load as :func:`flexkit.from_pretrained` does, with what an Auto class adds to the arguments."""
        return from_pretrained(name, **kwargs | {"trust_remote_code": False})

    @staticmethod
    def register_for_auto_class(auto_class: Any = None) -> None:
        """Nothing to do: saving a patched model writes what Auto classes need."""


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """``save_pretrained`` of a patched model: what the base model's writes, and what :func:`flexkit.save_flex` does.

    The config names code, in a file beside it, by which transformers' Auto classes load the patched model; a model card
    that is not there yet says what they load without it.

    A given ``state_dict`` may lack all that was added: then only the base model is saved.
    """
    added = added_parameters(self)
    weights: Mapping[str, Tensor] = added
    if state_dict is not None:
        weights = {name: state_dict[name] for name in added if name in state_dict}
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in added}
    if 0 < len(weights) < len(added):
        raise CheckpointError(
            f"the state_dict given has {len(weights)} of the {len(added)} tensors that flexkit added to this model; "
            "give all of them, or none to save the base model alone."
        )
    base = _without(self, added)
    vars(base)["_get_files_timestamps"] = _timestamps_of_others
    save = partial(type(self).save_pretrained, base, save_directory, is_main_process, state_dict, *args, **kwargs)
    if len(weights) < len(added) or Path(save_directory).is_file():
        save()
        return
    main = self.should_save_on_this_rank(is_main_process)
    with flex_draft(self, weights, save_directory, is_main_process=main) as (place, commit):
        commit = cache(commit)

        def upload(folder: str, *arguments: Any, **options: Any) -> Any:
            commit()
            return upload_modified_files(base, folder, *arguments, **options)

        def meet(*arguments: Any) -> None:
            commit()  # or other processes go on, and find the base model's files alone
            type(self).barrier_after_gathered_checkpoint_save(base, *arguments)

        vars(base).update(_upload_modified_files=upload, barrier_after_gathered_checkpoint_save=meet)
        if place is not None:
            vars(base)["config"] = config = copy.copy(self.config)
            code = dict.fromkeys(_AUTO_CLASSES, write_code(place, MODEL, "flexkit.checkpoints.PatchedModel"))
            config.auto_map = code | (getattr(config, "auto_map", None) or {})  # of a class of its own, its own
            if not Path(save_directory, CARD).exists():
                describe(place / CARD, self.config)
        with _set_aside(Path(save_directory) / SETTINGS, place):
            save()
            commit()


def upload_modified_files(self: PreTrainedModel, folder: str, *args: Any, **kwargs: Any) -> Any:
    """``_upload_modified_files`` of a patched model: a card that transformers wrote says what is loaded, too."""
    if Path(folder, SETTINGS).exists():
        describe(Path(folder, CARD), self.config)
    return type(self)._upload_modified_files(self, folder, *args, **kwargs)


def load_state_dict(self: PreTrainedModel, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """``load_state_dict`` of a patched model: a Trainer that resumes offers the base model's file only."""
    added = added_parameters(self)
    # Sharded models (FSDP2) get the whole state, in shards, to which a file's tensors do not fit.
    folder = _resumed() if not added.keys() <= state_dict.keys() else None
    if folder is not None and weights_file(folder) is not None:
        _, tensors = read_flex(folder)
        check_tensors({name: weight.shape for name, weight in added.items()}, tensors, source=folder)
        if not state_dict.keys() <= self.state_dict().keys():
            # Many models are saved under names of older versions, which only from_pretrained translates.
            with loading_the_base():
                state_dict = type(self).from_pretrained(folder).state_dict()
        state_dict = {**state_dict, **tensors}
    return type(self).load_state_dict(self, state_dict, *args, **kwargs)


@contextmanager
def _set_aside(path: Path, place: Path | None) -> Iterator[None]:
    """While the base model is written what was saved before is not loaded; it is back if that fails."""
    if place is None or not path.is_file():
        yield
        return
    aside = place / "before" / path.name
    aside.parent.mkdir()
    path.replace(aside)
    try:
        yield
    except BaseException:
        if not path.exists():
            aside.replace(path)
        raise


def _without(module: nn.Module, added: Container[str], prefix: str = "") -> Any:
    """A shallow copy of a module, down to where something was added; that is not in it."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    children = vars(twin)["_modules"] = dict(module._modules)
    for name, child in module._modules.items():
        path = f"{prefix}{name}."
        own = [path + parameter in added for parameter, _ in child.named_parameters()] if child is not None else []
        if own and all(own):
            del children[name]
        elif any(own):
            children[name] = _without(child, added, path)  # type: ignore[arg-type]
    return twin


def _timestamps_of_others(folder: str | PathLike[str]) -> dict[str, float]:
    """When the files of a folder changed: those that are not in here are always uploaded."""
    ours = (WEIGHTS, SETTINGS, CARD, f"{MODEL}.py")
    return {path.name: path.stat().st_mtime for path in Path(folder).iterdir() if path.name not in ours}


def _resumed() -> Path | None:
    """The checkpoint that a Trainer of transformers is loading right now.

    It hands a model the tensors of the base model's file and does not say where that lies; its own frames do.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.trainer":
            match frame.f_code.co_name:
                case "_load_from_checkpoint":
                    return Path(frame.f_locals["resume_from_checkpoint"])
                case "_load_best_model":
                    return Path(frame.f_locals["self"].state.best_model_checkpoint)
        frame = frame.f_back
    return None
