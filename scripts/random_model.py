"""Write a Llama checkpoint with random weights, for benchmarks and tests that download nothing:

python scripts/random_model.py --shape 1b --output-dir models/1b --tokenizer DIR
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.flags import parse_flags, run_main
from minisft.config.hf import parse_model_config
from minisft.demo import demo_model
from minisft.files.disk import write_json
from minisft.files.export import save_shards
from minisft.text.tokenizer import export_tokenizer_files, load_tokenizer

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Model shapes: hidden, ffn, layers, heads, key/value heads, head_dim, tied head, RoPE factor.
SHAPES = {
    "tiny": (128, 384, 2, 4, 2, 32, True, 32.0),
    "1b": (2048, 8192, 16, 32, 8, 64, True, 32.0),
    "3b": (3072, 8192, 28, 24, 8, 128, True, 32.0),
    "8b": (4096, 14336, 32, 32, 8, 128, False, 8.0),
    "70b": (8192, 28672, 80, 64, 8, 128, False, 8.0),
}


@dataclass(frozen=True)
class RandomModelConfig:
    """Write a Llama 3 of a published shape with normal random weights in bfloat16."""

    output_dir: str = ""
    """Directory to write the model to."""
    shape: str = "1b"
    """Model shape: tiny, 1b, 3b, 8b or 70b."""
    vocab_size: int = 128256
    """Vocabulary size: rows of the embedding."""
    layers: int = 0
    """Number of layers. 0: as many as the shape has."""
    tokenizer: str = ""
    """Directory to copy the tokenizer from. Default: the bundled demo model."""
    device: str = "cpu"
    """Device to draw the weights on: cpu or cuda."""
    seed: int = 0
    """Random seed of the weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, write the directory, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        default = RandomModelConfig()
        write(parse_flags(RandomModelConfig, argv, prog="random_model.py", default=default))

    return run_main(run, {})


def config_json(shape: str, vocab_size: int, layers: int = 0) -> dict:
    """Return the config.json of a published shape, in the layout of transformers v5.

    layers: number of layers; 0 for that of the shape. Raises UserError for an unknown shape.
    """
    if shape not in SHAPES:
        raise UserError(f"--shape is {shape!r}; expected one of {', '.join(SHAPES)}")
    hidden, ffn, depth, heads, kv_heads, head_dim, tied, factor = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": factor},
        "dtype": "bfloat16",
    }


def write(config: RandomModelConfig) -> None:
    """Write config.json, tokenizer files and sharded weights to config.output_dir."""
    if not config.output_dir:
        raise UserError("--output-dir is missing: give a directory to write the model to")
    raw = config_json(config.shape, config.vocab_size, config.layers)
    tokenizer = load_tokenizer(Path(config.tokenizer or demo_model()))
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in export_tokenizer_files(tokenizer).items():
        (out / name).write_bytes(data)
    shapes = parse_model_config(raw).weight_shapes()
    save_shards(out, random_weights(shapes, config), torch.bfloat16)
    write_json(out / "config.json", raw)


def random_weights(
    shapes: dict[str, tuple[int, ...]], config: RandomModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, bfloat16 tensor): matrices drawn from Normal(0, 0.02), norm weights of 1."""
    generator = torch.Generator(config.device).manual_seed(config.seed)
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        weight = torch.empty(shape, dtype=torch.bfloat16, device=config.device)
        yield name, weight.normal_(0, 0.02, generator=generator)


if __name__ == "__main__":
    sys.exit(main())
