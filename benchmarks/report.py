"""What every benchmark says beside its numbers, and where it writes."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import flexkit

__all__ = ["benchmark_parser", "facts", "ratios", "write"]


def benchmark_parser(description: str | None, width: int) -> argparse.ArgumentParser:
    """A parser of what every benchmark takes; ``width`` is the language model's, unless another is asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=width, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads of 128 channels")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way, in turns; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, help="a file; default: the terminal")
    return parser


def facts(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions, dtype, batch and the command."""
    text = model.config.get_text_config()
    on_gpu = options.device == "cuda"
    return {
        "command": " ".join(["python", "-m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "batch": 1,
        "versions": {
            "flexkit": flexkit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "language_model": {
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "key_heads": text.num_key_value_heads,
        },
    }


def ratios(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, float]:
    """Median over the rounds of each way's seconds by those of one way in the same round."""
    return {
        name: statistics.median(own / other for own, other in zip(each, seconds[to], strict=True))
        for name, each in seconds.items()
    }


def write(path: Path | None, found: Mapping[str, Any]) -> None:
    """Write what was found as JSON."""
    text = json.dumps(found, indent=1) + "\n"
    if path is None:
        print(text, end="")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
