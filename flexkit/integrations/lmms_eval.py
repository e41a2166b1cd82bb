"""The model ``flexkit`` of lmms-eval."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from loguru import logger
from tqdm import tqdm

import flexkit
from flexkit.errors import ConfigError, HighResInputError
from flexkit.integrations.loading import NONE, load_model_and_processor
from flexkit.integrations.views import Viewer, limit_pixels
from flexkit.selection import policy_from_dict

__all__ = ["FlexkitModel"]

_LIMIT = 1024
"""Tokens of an answer, where a task does not say."""
_BETWEEN_SHOTS = "\n\n"
"""lmms-eval puts it between examples, and so into what ends an answer, whatever the task says."""


class FlexkitModel(lmms):
    r"""A model of flexkit, as ``lmms_eval --model flexkit --model_args pretrained=...,preset=...`` names it.

    Parameters
    ----------
    pretrained : str
        A folder or a repository on the Hugging Face hub: a patched model that was saved; a base model, with a preset;
        or a checkpoint that the authors of FlexAttention published.
    preset : {"published", "training_free", "none"}, optional
        How a base model is patched, or that it is not. By default ``pretrained`` is patched already.
    view : {"low", "flexkit", "all"}, optional
        What the model is shown of a picture: the low-res view alone, a high-res view beside it, or all of that in its
        sequence. By default the high-res view, of a model that is not patched the low-res one.
    batch_size : int or str
        How many questions are answered at a time.
    device : str, optional
        By default accelerate's.
    device_map : str, optional
        Of ``from_pretrained``, in place of one device.
    dtype : str
        Of the weights; by default the one that they were saved in.
    attn_implementation, revision : str, optional
        Of ``from_pretrained``.
    trust_remote_code : bool
        Of ``from_pretrained``.
    max_pixels : int, optional
        Bounds the low-res view of a model that takes pictures of any size.
    system_prompt : str, optional
        What stands in front of every conversation, or a file that holds it.
    prompt_suffix : str
        Behind every question; ``\n`` in it is the end of a line.
    max_batch_size : int, optional
        Not used; lmms-eval gives it to every model.
    zoom : int, optional
        Of the high-res view. That of a model that is not patched says how much ``view="all"`` shows.
    **settings
        Other fields of :class:`flexkit.FlexConfig`, in place of the preset's; JSON where they are no words or numbers:
        ``policy={"type":"TopK","k":0.1}``, ``gate=null``.

    Raises
    ------
    FlexkitError
        If the model cannot be loaded, or does not have such a view.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        preset: str | None = None,
        view: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        prompt_suffix: str = "",
        max_batch_size: int | None = None,
        zoom: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        options = {
            "dtype": dtype,
            "device_map": device_map,
            "attn_implementation": attn_implementation,
            "revision": revision,
            "trust_remote_code": trust_remote_code or None,
        }
        given = {name: _value(name, value) for name, value in settings.items()}
        if zoom is not None and preset != NONE:
            given["zoom"] = _value("zoom", zoom)
        self.model, processor = load_model_and_processor(
            pretrained, preset, given, **{name: value for name, value in options.items() if value is not None}
        )
        if device_map is None:
            self.model.to(device if device and self.world_size == 1 else self.accelerator.device)
        if max_pixels is not None:
            limit_pixels(processor.image_processor, max_pixels)
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        patched = flexkit.is_patched(self.model)
        source = self.model if patched else _value("zoom", zoom)
        self.viewer = Viewer(processor, view or ("flexkit" if patched else "low"), source)
        self.batch_size, self.system_prompt = int(batch_size), self._resolve_system_prompt(system_prompt)
        self.prompt_suffix = prompt_suffix.replace("\\n", "\n")

    @property
    def device(self) -> torch.device:
        """Where the inputs of the model go."""
        device: torch.device = self.model.device if hasattr(self, "model") else self.accelerator.device
        return device

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer questions about pictures; an error ends the run, and no answer is made up for it.

        Parameters
        ----------
        requests : list of lmms_eval.api.instance.Instance
            The questions.
        """
        order = Collator(
            [request.args for request in requests],
            lambda each: (-len(self.tokenizer(each[0]).input_ids), each[0]),
            group_fn=lambda each: each[2],
            grouping=True,
        )
        found: list[GenerationResult] = []
        begin = time.perf_counter()
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for chunk in order.get_batched(n=self.batch_size):
                try:
                    found += self._answers(chunk)
                except Exception as error:
                    error.add_note(f"flexkit was answering {', '.join(f'{task} {at}' for *_, at, task, _ in chunk)}.")
                    raise
                bar.update(len(chunk))
        seconds, tokens = time.perf_counter() - begin, sum(each.token_counts.output_tokens for each in found)
        log_metrics(total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=tokens / max(seconds, 1e-9))
        answers: list[GenerationResult] = order.get_original(found)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not available: lmms-eval takes losses for log-likelihoods in some tasks and not in others.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "flexkit answers by generating, and gives no log-likelihoods of given answers: choose tasks whose "
            "output_type is generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not available.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "flexkit answers each question once, and tasks of several rounds ask again: choose tasks whose output_type "
            "is generate_until."
        )

    def _answers(self, chunk: Sequence[Any]) -> list[GenerationResult]:
        conversations = [
            self._conversation(to_messages(self.task_dict[task][split][index]))
            for _, to_messages, _, index, task, split in chunk
        ]
        kwargs = chunk[0][2]  # those of a chunk are the same
        inputs = self.viewer(conversations).to(self.device, self.model.dtype)
        tokens = self.model.generate(**inputs, **self._options(kwargs))
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        given = inputs["attention_mask"].sum(1).tolist()
        said = (tokens != self.tokenizer.pad_token_id).sum(1).tolist()
        return [
            GenerationResult(_until(text.strip(), kwargs.get("until")), TokenCounts(before, after))
            for text, before, after in zip(texts, given, said, strict=True)
        ]

    def _conversation(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As chat templates take it, pictures only."""
        if self.system_prompt:
            messages = self._apply_system_prompt(messages, self.system_prompt)
        chat = ChatMessages(messages=messages)
        _, videos, audios = chat.extract_media()
        if videos or audios:
            raise HighResInputError(
                f"flexkit reads pictures, and this task has {'videos' if videos else 'sounds'}: choose another task."
            )
        conversation: list[dict[str, Any]] = chat.to_hf_messages()
        texts = [part for part in conversation[-1]["content"] if part["type"] == "text"]
        if self.prompt_suffix and texts:
            texts[-1]["text"] += self.prompt_suffix
        return conversation

    def _options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a task says of generation, as transformers takes it: without a temperature it is greedy."""
        known = {name: value for name, value in kwargs.items() if hasattr(self.model.generation_config, name)}
        ignored = sorted(kwargs.keys() - known.keys() - {"until"})
        if ignored:
            logger.warning(f"flexkit does not know, and ignores, what the task says of {', '.join(ignored)}.")
        known["do_sample"] = bool(known.get("do_sample", True) and (known.get("temperature") or 0) > 0)
        if not known["do_sample"]:
            known |= {"temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": _LIMIT, "pad_token_id": self.tokenizer.pad_token_id} | known


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """A text up to what ends it."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        if end != _BETWEEN_SHOTS:
            text = text.split(end)[0]
    return text.strip()


def _value(name: str, given: Any) -> Any:
    """A setting, as it was meant on a command line."""
    if isinstance(given, str):
        try:
            given = json.loads({"None": "null"}.get(given, given))
        except ValueError as error:
            if given[:1] in ("{", "["):
                raise ConfigError(f"{name} is no JSON: {given} ({error}).") from error
    if name == "policy" and isinstance(given, Mapping):
        return policy_from_dict(given)
    return tuple(given) if isinstance(given, list) else given
