"""The demo: a tiny base model and a small chat dataset that ship with minisft (see README.md)."""

from pathlib import Path

from minisft.config import TrainConfig

HERE = Path(__file__).parent


def demo_model() -> str:
    """Directory of the demo's base model."""
    return str(HERE / "base")


def demo_config() -> TrainConfig:
    """What scripts/train.py runs without flags: about a minute on two CPU cores."""
    return TrainConfig(
        model=demo_model(),
        dataset=str(HERE / "chat_train.jsonl"),
        eval_dataset=str(HERE / "chat_eval.jsonl"),
        eval_generate=1000,
        learning_rate=1e-3,
        num_train_epochs=3,
        overwrite_output_dir=True,
    )
