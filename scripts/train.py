"""Fine-tune a Llama: `python scripts/train.py` runs the demo, `--help` lists every flag.

    python scripts/train.py --model meta-llama/Llama-3.2-1B --dataset rows.jsonl

`minisft.run.train` lists the phases of a run in order. Where each part lives:
    flags        minisft/config/train.py (the settings), minisft/config/flags.py (the parser)
    weights      minisft/files/load.py -> frozen, trainable (minisft/lora.py)
    rows         minisft/data/load.py -> token arrays -> minisft/batches.py
    chat         minisft/text/chat.py, minisft/text/masks.py
    forward      minisft/llama.py, minisft/nn.py, minisft/rope.py
    step         minisft/run.py -> minisft/step.py, minisft/loss.py, minisft/optim.py
    GPU pass     minisft/explicit/microbatch.py, minisft/explicit/block.py, kernels/
    logs, evals  minisft/session/report.py, minisft/session/evaluate.py
    output       minisft/files/checkpoint.py, minisft/files/export.py
Each folder has a README.md that says where a change goes.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence

# Importing torch takes seconds. Until `train` installs its handlers, a signal must exit with code
# 75 instead of a traceback; there is nothing to save yet.
if __name__ == "__main__":
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
        # Every demo run writes to the same directory and may replace an earlier demo run there.
        if demo and not config.resume_from_checkpoint and holds_demo_run(config.output_dir):
            config = dataclasses.replace(config, overwrite_output_dir=True)
        train(config)

    return run_main(run, {TrainingStopped: 3, Preempted: 75})


def names_a_model(argv: Sequence[str]) -> bool:
    """Return whether the flags name a model, dataset or config file; otherwise the demo runs."""
    flags = (word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--"))
    return any(ALIASES.get(name, name) in ("model", "dataset", "config") for name in flags)


if __name__ == "__main__":
    sys.exit(main())
