"""Fine-tune a Llama: `python scripts/train.py` runs the demo, `--help` lists every flag.

    python scripts/train.py --model meta-llama/Llama-3.2-1B --dataset rows.jsonl

What happens, in order, is `minisft.run.train`; where each part lives:
    flags      minisft/config/flags.py, minisft/config/train.py
    weights    minisft/files/weights.py      -> frozen, trainable (minisft/lora.py)
    rows       minisft/data/tokenize.py         -> batches (minisft/batches.py)
    forward    minisft/llama.py, minisft/nn.py
    step       minisft/run.py -> minisft/step.py, minisft/loss.py, minisft/optim.py
    files      minisft/files/checkpoint.py, minisft/files/export.py
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":  # a signal while torch loads is one too: nothing to save, exit code 75
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(75))

from minisft.config.flags import parse_flags, run_main
from minisft.config.names import ALIASES
from minisft.config.train import TrainConfig
from minisft.demo import demo_config, holds_demo_run
from minisft.run import train
from minisft.session.guards import TrainingStopped
from minisft.session.signals import Preempted


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, train, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        demo = not names_a_model(argv)
        asks_for_help = "--help" in argv or "-h" in argv
        default = demo_config() if demo and not asks_for_help else TrainConfig()
        config = parse_flags(TrainConfig, argv, prog="train.py", default=default)
        if demo and not config.resume_from_checkpoint and holds_demo_run(config.output_dir):
            config = dataclasses.replace(config, overwrite_output_dir=True)
        train(config)

    return run_main(run, {TrainingStopped: 3, Preempted: 75})


def names_a_model(argv: Sequence[str]) -> bool:
    """Whether the flags say what to train (then nothing of the demo's settings applies)."""
    flags = (word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--"))
    return any(ALIASES.get(name, name) in ("model", "dataset", "config") for name in flags)


if __name__ == "__main__":
    sys.exit(main())
