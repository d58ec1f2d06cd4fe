"""Merge an adapter into its base: a directory that transformers, vLLM and llama.cpp load.

    python scripts/merge.py --adapter outputs --output-dir merged

Prints which base it merged onto, and how far the logits of the merged model are from those of the
adapter on that base. If the adapter was trained on the other kind of base (4-bit or 16-bit), it
also prints how far they are from the logits on that one.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minisft.config.errors import UserError
from minisft.config.flags import parse_flags, run_main
from minisft.session.merge import merge
from minisft.session.signals import Preempted, stop_signals


@dataclass(frozen=True)
class MergeConfig:
    """Write the base model with the adapter merged into its weights."""

    adapter: str = ""
    """A PEFT adapter directory, such as a run's output directory."""
    output_dir: str = ""
    """Directory to write the merged model to; new or empty."""
    model: str = ""
    """Base model: a directory or a hub id. Default: the base that the adapter names."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Default: the revision that the adapter names."""
    base: str = "auto"
    """16bit: the base as stored. dequant: the base decoded from 4 bits, as an adapter trained with
    --load-in-4bit saw it. auto: the one that the adapter was trained on."""
    dtype: str = "auto"
    """Dtype of the written weights: bfloat16, float16 or float32. auto: the base's dtype."""
    device: str = "auto"
    """Device to merge on: auto, cpu, cuda or cuda:N."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, merge, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        config = parse_flags(MergeConfig, argv, prog="merge.py", default=MergeConfig())
        for name in ("adapter", "output_dir"):
            if not getattr(config, name):
                raise UserError(f"--{name.replace('_', '-')} is missing; give a directory")
        with stop_signals("before the model was complete; its partial files are deleted"):
            done = merge(
                config.adapter,
                config.output_dir,
                model=config.model,
                revision=config.revision,
                base=config.base,
                dtype=config.dtype,
                device=config.device,
            )
        print(done)
        print(f"saved to {config.output_dir}")

    return run_main(run, {Preempted: 75})


if __name__ == "__main__":
    sys.exit(main())
