"""What a run says before its first step and after its last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from minisft.batches import Batches
from minisft.config.train import TrainConfig
from minisft.data.load import Data, is_sample
from minisft.data.preview import describe_data, show_preview
from minisft.data.sources import num_shared
from minisft.explicit import Choice
from minisft.files.adapter import adapter_config_dict, read_adapter_config
from minisft.files.disk import load_json
from minisft.files.load import Base
from minisft.kernels.nf4 import NF4Weight
from minisft.lora import EMBEDDING_WEIGHTS, Flat
from minisft.session.outputs import TrainOutput, as_flags
from minisft.session.report import say
from minisft.session.serving import commands, vllm_problems
from minisft.step import State
from minisft.variants.pissa import exported_lora


def describe(
    config: TrainConfig, model: Base, data: Data, state: State, batches: Batches, steps: int
) -> None:
    """The few lines a reader wants before the first step."""
    cfg = model.cfg
    trained, frozen = (
        state.trainable.buffer.numel(),
        sum(math.prod(w.shape) for w in model.frozen.values()),
    )
    share = trained / (trained + frozen)
    say(
        f"model   {config.model}: {cfg.num_hidden_layers} layers, hidden {cfg.hidden_size}, "
        f"{trained + frozen:,} parameters, {trained:,} trained ({share:.2%}), "
        f"{str(model.compute.dtype).removeprefix('torch.')} on {model.device}"
    )
    packed = [w for w in model.frozen.values() if isinstance(w, NF4Weight)]
    if packed:
        kinds = "/".join(sorted({w.quant_type for w in packed}))
        mib = sum(w.nbytes() for w in packed) / 2**20
        say(
            f"        {len(packed)} frozen linears in 4 bits ({kinds}), {mib:,.1f} MiB "
            "(--no-load-in-4bit keeps them in full)"
        )
    elif config.full_finetuning:
        say("        every weight is trained, in float32: --load-in-4bit is off")
    if config.dry_run:
        say(f"        {model.directory}: every tensor's header agrees with config.json; not loaded")
    else:
        say(f"        loaded in {model.load_seconds:.1f} s, peak {model.load_peak_gib:.2f} GiB")
    for name in ("config.json", "tokenizer_config.json"):
        raw = load_json(path) if (path := model.directory / name).exists() else {}
        if isinstance(raw, dict) and raw.get("auto_map"):
            say(f"warning: {name} has an auto_map; no code that comes with a model is run")
    if model.lora and model.lora.modules_to_save:
        names = ", ".join(model.lora.modules_to_save)
        tied = " (tied: one matrix)" if cfg.tie_word_embeddings else ""
        say(f"        trained copies beside the adapter: {names}{tied}")
    for what, dataset in (("data", data.train), ("eval", data.eval)):
        if dataset is not None:
            for line in describe_data(what, dataset.stats):
                say(line)
            if config.dry_run and is_sample(dataset):
                of_all = sum(told["rows_total"] for told in dataset.stats["sources"])
                say(f"        (a sample of {of_all:,} rows)")
    tokens = min(data.train.stats["longest"], config.max_length)
    if tokens > cfg.max_position_embeddings:
        say(
            f"warning: documents of up to {tokens:,} tokens, but the model was made for up to "
            f"{cfg.max_position_embeddings:,} (max_position_embeddings); lower --max-length"
        )
    if data.eval is not None and (shared := num_shared(data.train, data.eval)):
        say(f"warning: {shared:,} of {len(data.eval):,} eval rows are among the training rows")
    for told, (size, drawn) in zip(
        data.train.stats["sources"], batches.schedule.shares, strict=False
    ):
        say(f"        {told['source']}: {drawn:,} rows an epoch, of {size:,}")
    show_preview(data.train, model.tokenizer, config.preview, config.preview_json, say)
    if model.lora:
        described = adapter_config_dict(
            exported_lora(model.lora), cfg, config.base_name, tied=cfg.tie_word_embeddings,
            revision=None,
        )  # fmt: skip
        for problem in vllm_problems(described):
            say(f"warning: vLLM will not take this adapter as it is ({problem}); merge it first")
    schedule = batches.schedule
    about = "about " if config.dry_run and is_sample(data.train) else ""
    say(
        f"steps   {about}{steps} ({about}{schedule.steps_per_epoch} an epoch), "
        f"{schedule.batch_size} x {schedule.accumulation} rows each, "
        f"learning rate {config.learning_rate:g} {config.lr_scheduler_type}, "
        f"output {config.output_dir}"
    )
    say(f"settings {as_flags(config)}")
    if schedule.num_rows < schedule.batch_size * schedule.accumulation:
        say(f"warning: the rows ({schedule.num_rows}) do not fill one step; every step is shorter")


def without_effect(
    config: TrainConfig, choice: Choice, trainable: Flat, data: Data
) -> Iterator[tuple[str, str]]:
    """(name, why) of each setting that was given and that this run makes no use of.

    What the settings alone tell is refused (`TrainConfig`), unless Trainer takes the pair.
    """
    idle = []
    if not choice.peak_bytes:
        why = f"only the explicit pass on a GPU is planned by it, and this is {choice.description}"
        idle += [("micro_batch_tokens", why), ("max_memory_gib", why)]
    unread = {"sgd": ("adam_beta1", "adam_beta2", "adam_epsilon"), "lion_8bit": ("adam_epsilon",)}
    unread["adafactor"] = unread["sgd"]
    idle += [(name, f"--optim {config.optim} has none") for name in unread.get(config.optim, ())]
    if not any(name in trainable.views for name in EMBEDDING_WEIGHTS):
        idle.append(("embedding_learning_rate", "no embedding and no head is trained in full"))
    if config.max_steps > 0:
        idle.append(("num_train_epochs", f"--max-steps {config.max_steps} is given"))
    if config.save_strategy == "no":
        idle.append(("save_total_limit", "--save-strategy no writes no checkpoints"))
    if config.report_to == ("trackio",):
        idle.append(("logging_dir", "trackio writes to its own, $TRACKIO_DIR"))
    sources = data.train.stats["sources"] + (data.eval.stats["sources"] if data.eval else [])
    if all(told["format"] != "text" for told in sources):
        idle.append(("dataset_text_field", "no rows are of the format text"))
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return ((name, why) for name, why in idle if getattr(config, name) != defaults[name])


def summarise(out: Path, result: TrainOutput, config: TrainConfig, model: Base) -> None:
    """The closing lines: answers, losses, memory, time, and what to do with the result."""
    metrics = result.metrics
    for sample in metrics.get("samples", [])[:5]:
        prompt, before, after = (shorten(sample[k]) for k in ("prompt", "before", "after"))
        say(f"  {prompt}\n    before: {before}\n    after:  {after}")
    if "right_after" in metrics:
        say(
            f"right answers: {metrics['right_before']} of {metrics['answers']} before, "
            f"{metrics['right_after']} after"
        )
    if metrics.get("eval_loss_before") is not None:
        say(
            f"eval loss: {metrics['eval_loss_before']:.4f} before, {metrics['eval_loss']:.4f} after"
        )
    total = ""
    if model.device.type == "cuda":
        gib = torch.cuda.get_device_properties(model.device).total_memory / 2**30
        total = f" of {gib:.2f} GiB"
    say(
        f"memory  {metrics['memory_before_gib']:.2f} GiB allocated before training, "
        f"{metrics['memory_after_gib']:.2f} after, peak {metrics['peak_memory_gib']:.2f}{total}"
    )
    say(
        f"time    {metrics['train_runtime']:.1f} s, "
        f"{metrics['train_steps_per_second']:.2f} steps/s, "
        f"{metrics['train_tokens_per_second']:,.0f} tokens/s"
    )
    say(f"done: {result.global_step} steps, mean loss {result.training_loss:.4f}; saved to {out}")
    if config.lora and config.lora.splits_weights:
        where = " in 4 bits; load it on the base in 16 bits, which is nearest"
        say(
            "the adapter file holds the change from the base, at twice the rank; it was trained "
            f"beside the rest of each weight{where if config.load_in_4bit else ''}"
        )
    adapter = None if config.full_finetuning else read_adapter_config(out)
    dtype = str(model.compute.dtype).removeprefix("torch.")
    stored_so = "quantization_config" in load_json(model.directory / "config.json")
    quantized = config.serves_in_4bit and not stored_so
    for line in commands(out, config.base_name, adapter, dtype if quantized else None):
        say(line)


def shorten(text: str, width: int = 90) -> str:
    """One quoted line of at most `width` characters."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")
