"""Print the summaries before the first and after the last training step, and the warnings."""

import math

import torch

from minisft.config.errors import flag
from minisft.config.fields import idle_settings
from minisft.data.load import is_sample, most_tokens, num_shared
from minisft.data.preview import describe_data, show_preview
from minisft.files.adapter_config import adapter_config_dict, read_adapter_config
from minisft.files.device import memory_gib
from minisft.files.disk import load_json
from minisft.kernels.nf4 import NF4Weight
from minisft.lora import EMBEDDING_WEIGHTS
from minisft.session.context import Run
from minisft.session.evaluate import most_eval_tokens
from minisft.session.memory import estimate, in_words
from minisft.session.outputs import TrainOutput, as_flags
from minisft.session.report import say
from minisft.session.serving import commands, vllm_problems
from minisft.variants.pissa import exported_lora


def note_memory_needs(run: Run) -> None:
    """Fill run.needs with the memory estimate that dry runs and out-of-memory messages show."""
    tokens = most_tokens(run.data, run.batches, run.total_steps)
    evaluated = 0 if run.data.eval is None else most_eval_tokens(run.data.eval, run.config)
    run.needs.update(estimate(run.base, run.state, run.plan, tokens, evaluated))


def announce(run: Run) -> None:
    """Print model, data, plan and warnings before the first step."""
    config, cfg = run.config, run.base.cfg
    _announce_model(run)
    _announce_data(run)
    show_preview(run.data.train, run.tokenizer, config.preview, config.preview_json, say)
    if run.base.lora:
        adapter = adapter_config_dict(exported_lora(run.base.lora), cfg, config.base_name)
        for problem in vllm_problems(adapter):
            say(f"warning: vLLM cannot load this adapter as it is ({problem}); merge it first")
    _announce_steps(run)
    assert run.plan.choice is not None
    say(f"pass    {run.plan.choice.description}")
    _warn_of_idle_settings(run)


def _announce_model(run: Run) -> None:
    config, base, cfg = run.config, run.base, run.base.cfg
    trained = run.state.trainable.buffer.numel()
    total = trained + sum(math.prod(w.shape) for w in base.frozen.values())
    say(
        f"model   {config.model}: {cfg.num_hidden_layers} layers, hidden {cfg.hidden_size}, "
        f"{total:,} parameters, {trained:,} trained ({trained / total:.2%}), "
        f"{str(base.compute.dtype).removeprefix('torch.')} on {base.device}"
    )
    packed = [w for w in base.frozen.values() if isinstance(w, NF4Weight)]
    if packed:
        kinds = "/".join(sorted({w.quant_type for w in packed}))
        mib = sum(w.nbytes() for w in packed) / 2**20
        say(
            f"        {len(packed)} frozen linears in 4 bits ({kinds}), {mib:,.1f} MiB "
            "(--no-load-in-4bit keeps them in the compute dtype)"
        )
    elif config.full_finetuning:
        say("        all weights are trained, in float32: --load-in-4bit is off")
    if config.dry_run:
        say(f"        {base.directory}: tensor headers match config.json; not loaded")
    else:
        say(f"        loaded in {base.load_seconds:.1f} s, peak {base.load_peak_gib:.2f} GiB")
    for name in ("config.json", "tokenizer_config.json"):
        raw = load_json(path) if (path := base.directory / name).exists() else {}
        if isinstance(raw, dict) and raw.get("auto_map"):
            say(f"warning: {name} has an auto_map; code that comes with a model is never run")
    if base.lora and base.lora.modules_to_save:
        names = ", ".join(base.lora.modules_to_save)
        tied = " (tied: one matrix)" if cfg.tie_word_embeddings else ""
        say(f"        fully trained copies, stored with the adapter: {names}{tied}")


def _announce_data(run: Run) -> None:
    config, data, cfg = run.config, run.data, run.base.cfg
    for what, dataset in (("data", data.train), ("eval", data.eval)):
        if dataset is None:
            continue
        for line in describe_data(what, dataset.stats):
            say(line)
        if config.dry_run and is_sample(dataset):
            of_all = sum(source["rows_total"] for source in dataset.stats["sources"])
            say(f"        (a sample of {of_all:,} rows)")
    tokens = min(data.train.stats["longest"], config.max_length)
    if tokens > cfg.max_position_embeddings:
        say(
            f"warning: documents of up to {tokens:,} tokens, but the model supports up to "
            f"{cfg.max_position_embeddings:,} (max_position_embeddings); lower --max-length"
        )
    if data.eval is not None and (shared := num_shared(data.train, data.eval)):
        say(f"warning: {shared:,} of {len(data.eval):,} eval rows are among the training rows")
    sources, shares = data.train.stats["sources"], run.batches.schedule.shares
    # `shares` is empty unless --dataset gives sampling weights; then nothing is printed here.
    for source, (size, drawn) in zip(sources, shares, strict=False):
        say(f"        {source['source']}: {drawn:,} rows an epoch, of {size:,}")


def _announce_steps(run: Run) -> None:
    config, schedule = run.config, run.batches.schedule
    about = "about " if config.dry_run and is_sample(run.data.train) else ""
    say(
        f"steps   {about}{run.total_steps} ({about}{schedule.steps_per_epoch} an epoch), "
        f"{schedule.batch_size} x {schedule.accumulation} rows each, "
        f"learning rate {config.learning_rate:g} {config.lr_scheduler_type}, "
        f"output {config.output_dir}"
    )
    say(f"settings {as_flags(config)}")
    if schedule.num_rows < schedule.batch_size * schedule.accumulation:
        say(f"warning: the {schedule.num_rows} rows do not fill one step; every step is shorter")


def _warn_of_idle_settings(run: Run) -> None:
    # Conflicts visible in the settings alone are errors in TrainConfig, unless Trainer allows them.
    config, data, choice = run.config, run.data, run.plan.choice
    idle = []
    if choice and not choice.peak_bytes:
        why = f"only the explicit pass on a GPU is planned by it, and this is {choice.description}"
        idle += [("micro_batch_tokens", why), ("max_memory_gib", why)]
    if not any(name in run.state.trainable.views for name in EMBEDDING_WEIGHTS):
        idle.append(("embedding_learning_rate", "no embedding and no head is trained in full"))
    sources = data.train.stats["sources"] + (data.eval.stats["sources"] if data.eval else [])
    if all(source["format"] != "text" for source in sources):
        idle.append(("dataset_text_field", "no rows are of the format text"))
    # Compare with the field's default, which a dataclass stores as a class attribute.
    given = [(n, why) for n, why in idle if getattr(config, n) != getattr(type(config), n)]
    for name, why in given + [(name, why) for name, why, _ in idle_settings(config)]:
        say(f"warning: {flag(name)} {getattr(config, name)} has no effect: {why}")


def summarise(run: Run, result: TrainOutput) -> None:
    """Print the final report: answers, losses, memory, time, and commands that use the result."""
    m, config, device = result.metrics, run.config, run.base.device
    for sample in m.get("samples", [])[:5]:
        texts = (sample[key] for key in ("prompt", "before", "after"))
        prompt, before, after = (repr(t if len(t) <= 90 else t[:89] + "…") for t in texts)
        say(f"  {prompt}\n    before: {before}\n    after:  {after}")
    if "right_after" in m:
        right = f"{m['right_before']} of {m['answers']} before, {m['right_after']} after"
        say(f"correct answers: {right}")
    if m.get("eval_loss_before") is not None:
        say(f"eval loss: {m['eval_loss_before']:.4f} before, {m['eval_loss']:.4f} after")
    total = ""
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        total = f" of {gib:.2f} GiB"
    say(
        f"memory  {m['memory_before_gib']:.2f} GiB allocated before training, "
        f"{m['memory_after_gib']:.2f} after, peak {m['peak_memory_gib']:.2f}{total}"
    )
    rates = f"{m['train_steps_per_second']:.2f} steps/s, {m['train_tokens_per_second']:,.0f}"
    say(f"time    {m['train_runtime']:.1f} s, {rates} tokens/s")
    steps, loss = result.global_step, result.training_loss
    say(f"done: {steps} steps, mean loss {loss:.4f}; saved to {run.out}")
    if config.lora and config.lora.splits_weights:
        # Training quantised only the residual (base weight minus the initial B A), but the B A in
        # the file is relative to the full base weight: no 4-bit base matches it exactly.
        where = " in 4 bits; load it on the base in 16 bits, the closest match"
        say(
            "the adapter file holds the change from the base weights, at twice the rank; training "
            f"used the residual weights{where if config.load_in_4bit else ''}"
        )
    _print_commands(run)


def _print_commands(run: Run) -> None:
    adapter = None if run.config.full_finetuning else read_adapter_config(run.out)
    dtype = str(run.base.compute.dtype).removeprefix("torch.")
    stored_in_4bit = "quantization_config" in load_json(run.base.directory / "config.json")
    quantized = run.config.serves_in_4bit and not stored_in_4bit
    for line in commands(run.out, run.config.base_name, adapter, dtype if quantized else None):
        say(line)


def end_of_dry_run(run: Run) -> TrainOutput:
    """Print the memory estimate of a dry run; return it, total_steps and num_rows as metrics."""
    base, needs = run.base, run.needs
    # On a CPU, the interpreter and torch use the same memory as the model, so count them.
    if base.device.type == "cpu":
        needs = {"this process so far": memory_gib(base.device), **needs}
    say(f"memory  about {sum(needs.values()):.2f} GiB: {in_words(needs)}")
    if base.device.type == "cpu":
        say("        (the allocator keeps freed blocks: the process may grow to nearly twice that)")
    say("dry run: nothing was trained, and nothing was written to the output directory")
    metrics = {"total_steps": run.total_steps, "num_rows": run.batches.schedule.num_rows}
    metrics |= {"memory_gib": needs, "data": run.data.train.stats}
    return TrainOutput(0, math.nan, metrics | {"model_directory": str(base.directory)})
