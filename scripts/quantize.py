"""Write a 4-bit copy of a model that minisft and transformers + bitsandbytes can load:

python scripts/quantize.py --model meta-llama/Llama-3.2-1B --output-dir models/1b-nf4
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from minisft.kernels.nf4 import quantize
from minisft.kernels.nf4.reference import CODES
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.flags import parse_flags, run_main
from minisft.files.device import resolve_device
from minisft.files.disk import atomic_directory, load_json_object, refuse_existing, write_json
from minisft.files.export import save_shards, write_model_files
from minisft.files.quant_state import to_tensors
from minisft.files.safetensors import read_header
from minisft.files.weights import (
    Checkpoint,
    load_model_config,
    open_checkpoint,
    quantising,
    resolve_model,
    stream_weights,
    to_device,
)
from minisft.llama import EMBEDDING
from minisft.session.signals import Preempted, stop_signals
from minisft.text.tokenizer import export_tokenizer_files, load_tokenizer


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantise the linear layers of a model. Embedding, head and norms are not quantised."""

    model: str = ""
    """Model to quantise, stored in 16 or 32 bits: a directory or a hub id."""
    output_dir: str = ""
    """Directory to write the copy to; new or empty."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    quant_type: str = "nf4"
    """4-bit data type: nf4 or fp4."""
    double_quant: bool = True
    """Quantise the block scales to 8 bits (double quantisation)."""
    dtype: str = "auto"
    """Dtype of the tensors that are not quantised: bfloat16, float16 or float32. auto: the dtype in
    config.json, or else that of the stored embedding."""
    device: str = "auto"
    """Device to quantise on: auto, cpu, cuda or cuda:N."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, write the directory, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        with stop_signals("before the copy was complete; its partial files are deleted"):
            write(parse_flags(QuantizeConfig, argv, prog="quantize.py", default=QuantizeConfig()))

    return run_main(run, {Preempted: 75})


def write(config: QuantizeConfig) -> None:
    """Write shards, tokenizer and config.json to config.output_dir, atomically.

    Raises UserError for invalid settings, an existing directory or a model already in 4 bits.
    """
    if not config.model or not config.output_dir:
        missing = "--output-dir" if config.model else "--model"
        raise UserError(f"{missing} is missing: give the model and a directory for its 4-bit copy")
    if config.quant_type not in CODES:
        raise UserError(f"--quant-type is {config.quant_type!r}; expected nf4 or fp4")
    if config.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(
            f"--dtype is {config.dtype!r}; expected one of auto, bfloat16, float16, float32"
        )
    out = Path(config.output_dir)
    refuse_existing(out)
    device = resolve_device(config.device)
    directory = resolve_model(config.model, config.revision)
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    if checkpoint.four_bit:
        raise UserError(f"{directory} is already in 4 bits; give the unquantised model")
    file, key = checkpoint.places[EMBEDDING]
    dtype_in_file = str(read_header(file).tensors[key].dtype).removeprefix("torch.")
    stored = checkpoint.cfg.dtype or dtype_in_file
    name = stored if config.dtype == "auto" else config.dtype
    tokenizer = load_tokenizer(directory)
    dtype = getattr(torch, name)
    with atomic_directory(out) as partial:
        save_shards(partial, quantised(checkpoint, config, device, dtype), None)
        files = export_tokenizer_files(tokenizer)
        write_model_files(partial, directory, checkpoint.cfg, dtype, files)
        # write_model_files copies the config.json of the unquantised model. Add the quantization,
        # or a loader would read packed bytes as 16-bit weights.
        raw = load_json_object(partial / "config.json")
        raw["quantization_config"] = quantization_config(config, name)
        write_json(partial / "config.json", raw)
    print(f"saved to {out}")


def quantised(
    checkpoint: Checkpoint, config: QuantizeConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the 4-bit copy: packed linears and quant states, the rest in `dtype`.

    Only one weight is in memory at a time. Raises UserError if a weight is not finite.
    """
    linears = {f"{path}.weight" for path in checkpoint.cfg.linear_paths()}
    for name, weight in stream_weights(checkpoint):
        if name not in linears:
            plain = to_device(name, weight, torch.device("cpu"), dtype, four_bit=False)
            assert isinstance(plain, Tensor)
            if not plain.isfinite().all():
                raise UserError(
                    f"{checkpoint.places[name][0]}: {name} contains a non-finite value in "
                    f"{str(dtype).removeprefix('torch.')}; use another --dtype or another model"
                )
            yield name, plain
            continue
        assert isinstance(weight, Tensor)
        kind = {"quant_type": config.quant_type, "double_quant": config.double_quant}
        with quantising(name, checkpoint.places[name][0]):
            packed = quantize(weight.to(device), **kind)
        yield from to_tensors(name, packed, dtype).items()


def quantization_config(config: QuantizeConfig, dtype: str) -> dict[str, Any]:
    """Return the `quantization_config` that transformers writes to config.json for this model."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "_load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


if __name__ == "__main__":
    sys.exit(main())
