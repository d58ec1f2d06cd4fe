"""Settings and paths of the demo: a tiny base model and a small chat dataset (see README.md)."""

import json
from pathlib import Path

from minisft.config.train import TrainConfig

HERE = Path(__file__).parent


def demo_model() -> str:
    """Return the directory of the demo's base model."""
    return str(HERE / "base")


def demo_config() -> TrainConfig:
    """Return the settings of scripts/train.py without flags: under a minute on two CPU cores."""
    return TrainConfig(
        model=demo_model(),
        dataset=(str(HERE / "chat_train.jsonl"),),
        eval_dataset=str(HERE / "chat_eval.jsonl"),
        eval_generate=1000,
        learning_rate=1e-3,
        num_train_epochs=3,
    )


def holds_demo_run(output_dir: str) -> bool:
    """Return True if the run.json in output_dir has the settings of a demo run."""
    # These settings identify a demo run among runs on its base model; others may differ.
    names = ("model", "dataset", "eval_dataset", "learning_rate", "num_train_epochs", "max_steps")
    demo = demo_config()
    try:
        record = json.loads((Path(output_dir) / "run.json").read_text(encoding="utf-8"))
        # Convert to JSON and back so that tuples become lists, as in run.json.
        expected = json.loads(json.dumps([getattr(demo, name) for name in names]))
        return [record["config"][name] for name in names] == expected
    except (OSError, ValueError, KeyError, TypeError):
        return False
