"""Merge an adapter into its base: a directory that transformers, vLLM and llama.cpp load.

    python scripts/merge.py --adapter outputs --output-dir merged

Says which base it merged onto, and how far the logits of what it wrote are from those of the
adapter on that base; where the adapter was trained on another (4 bits, or not), from those too.
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
    """Write base and adapter as one model."""

    adapter: str = ""
    """A PEFT adapter directory, such as a run's output directory."""
    output_dir: str = ""
    """A directory that does not exist yet."""
    model: str = ""
    """Base model: a directory or a hub id; left out, the adapter's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; left out, the adapter's own."""
    base: str = "auto"
    """16bit: the base as it is stored. dequant: decoded from 4 bits, as an adapter saw it that was
    trained with --load-in-4bit. auto: what the adapter was trained on."""
    dtype: str = "auto"
    """Of the file: bfloat16, float16 or float32; auto is the base's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, merge, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        config = parse_flags(MergeConfig, argv, prog="merge.py", default=MergeConfig())
        for name in ("adapter", "output_dir"):
            if not getattr(config, name):
                raise UserError(f"--{name.replace('_', '-')} is missing; give a directory")
        with stop_signals("before the model was whole; nothing is left of it"):
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
