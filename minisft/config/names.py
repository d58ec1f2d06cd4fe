"""Hugging Face's names for settings: what each is called here, or why there is none.

Names that are the same need no entry. Standard library only. The table for readers is
docs/arguments.md; a test compares the three.
"""

from __future__ import annotations

from collections.abc import Mapping

from minisft.config.errors import UserError, flag

# transformers, TRL, PEFT, Unsloth -> the setting here that means the same.
ALIASES = {
    "bnb_4bit_compute_dtype": "dtype",
    "chat_template_path": "chat_template",
    "dataset_name": "dataset",
    "evaluation_strategy": "eval_strategy",
    "full_determinism": "deterministic",
    "label_smoothing_factor": "label_smoothing",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_modules": "target_modules",
    "loraplus_lr_embedding": "embedding_learning_rate",
    "max_seq_length": "max_length",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_revision": "revision",
    "r": "lora_r",
    "random_state": "seed",
    "train_dataset": "dataset",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "warmup_ratio": "warmup_steps",
}
# Values of theirs, by the name here -> the value here.
VALUES = {
    "dtype": {"none": "auto"},
    "gradient_checkpointing": {"true": "full", "false": "none", "unsloth": "full+offload"},
}
# Switches that choose one value of a setting here; off leaves the setting alone.
SWITCHES = {
    "activation_checkpointing": ("gradient_checkpointing", "block"),
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "use_cpu": ("device", "cpu"),
}
_FIRST = "no such start is implemented: see --init-lora-weights for those that are"
_VARIANT = "no such variant is implemented: plain LoRA, --use-rslora and --use-dora are"
_SERVING = "it configures an inference engine, which training does not start"
_ONE_GPU = "training runs on one device; multi-GPU training is not implemented yet"
_HUB = "nothing is uploaded; use the `hf upload` command on the output directory"
_KERNELS = "the kernels here are used instead"
_MEANS = "no logits are kept: means over tokens are reported"
_DOUBLE = "a base is quantised with double quantisation; scripts/quantize.py --no-double-quant \
writes a copy without, to train on"
_ALWAYS_TOKENS = "the loss is always the mean over the tokens of the whole step"
# What the arguments of Trainer, PEFT and Unsloth configure and this loop does not have, and why; a
# name that ends in * stands for all that begin so.
REFUSED = {
    "accelerator_config": "accelerate is not used",
    "activation_checkpointing_kwargs": "--gradient-checkpointing alone decides",
    "activation_offloading": "use --gradient-checkpointing offload",
    "alora_invocation_tokens": _VARIANT,
    "arrow_config": _VARIANT,
    "auto_find_batch_size": "micro-batches are cut by tokens; lower --per-device-train-batch-size",
    "auto_mapping": "the adapter names its base's class by task_type alone",
    "average_tokens_across_devices": _ALWAYS_TOKENS,
    "base_model_name_or_path": "the adapter names what --model gives",
    "batch_eval_metrics": _MEANS,
    "bf16_full_eval": "evaluation computes in --dtype, as training does",
    "bias": "biases of the base stay frozen, as with PEFT's default",
    "bnb_4bit_quant_storage": "4-bit weights are kept as bytes",
    "bnb_4bit_quant_type": "a base is quantised to NF4; for FP4 train on a copy, which "
    "scripts/quantize.py --quant-type fp4 writes",
    "bnb_4bit_use_double_quant": _DOUBLE,
    "corda_config": _FIRST,
    "data_collator": "from Python: minisft.train(config, batch_fn=collator)",
    "data_seed": "--seed decides the order of the rows",
    "dataloader_drop_last": "the last, shorter step of an epoch is trained, as Trainer does",
    "dataloader_*": "rows are tokenised before the first step; nothing is left to load",
    "dataset_kwargs": "give the settings by their own flags",
    "ddp_*": _ONE_GPU,
    "debug": "use --deterministic, or a debugger",
    "deepspeed": _ONE_GPU,
    "device_map": "give the one device by --device",
    "disable_log_stats": _SERVING,
    "disable_tqdm": "the progress bar appears on a terminal only",
    "do_eval": "give --eval-dataset to evaluate",
    "do_predict": "use scripts/generate.py",
    "do_train": "scripts/train.py always trains",
    "enable_jit_checkpoint": "a checkpoint is always written on SIGTERM",
    "ensure_weight_tying": "a tied base stays tied: embedding and head are one trained copy",
    "eos_token": "the tokenizer's own is used; edit tokenizer_config.json to change it",
    "eva_config": _FIRST,
    "eval_accumulation_steps": "no logits are kept, so nothing accumulates",
    "eval_delay": "give --eval-steps",
    "eval_do_concat_batches": _MEANS,
    "eval_on_start": "evaluation before the first step is always made",
    "eval_packing": "evaluation rows are laid side by side without packing; the loss is the same",
    "eval_use_gather_object": _MEANS,
    "fan_in_fan_out": "the linears here are stored as [out, in]",
    "fast_inference": _SERVING,
    "fix_tokenizer": "the tokenizer is taken as it is",
    "float8_kv_cache": _SERVING,
    "fp16_full_eval": "evaluation computes in --dtype, as training does",
    "fsdp*": _ONE_GPU,
    "gpu_memory_utilization": "use --max-memory-gib",
    "gradient_checkpointing_kwargs": "--gradient-checkpointing alone decides",
    "group_by_length": "rows are laid side by side without padding; their order is Trainer's",
    "hub_*": _HUB,
    "ignore_data_skip": "resuming needs no skipping: rows are a function of the step",
    "include_for_metrics": _MEANS,
    "include_num_input_tokens_seen": "num_tokens is always counted",
    "inference_mode": "training trains; scripts/generate.py answers",
    "kasa_config": _VARIANT,
    "label_names": "labels are made from the rows",
    "length_column_name": "lengths are counted",
    "liger_kernel_config": _KERNELS,
    "load_in_16bit": "use --no-load-in-4bit",
    "load_in_8bit": "the base is kept in 4 bits (--load-in-4bit) or in full",
    "local_rank": _ONE_GPU,
    "log_level*": "lines are printed as they come; metrics.jsonl has the numbers",
    "log_on_each_node": _ONE_GPU,
    "logging_first_step": "use --logging-steps 1",
    "logging_nan_inf_filter": "a loss that is not finite ends the run and is never averaged away",
    "logging_strategy": "use --logging-steps",
    "layer_replication": "no layer is used twice: write the longer model out first",
    "layers_pattern": "the models here have one list of layers",
    "loftq_config": "of such starts there is --init-lora-weights pissa_niter_4, which too leaves "
    "less to quantise",
    "lora_bias": "B has no bias, as with PEFT's default",
    "lora_ga_config": _FIRST,
    "lora_target_parameters": "the models here have linears alone: use --target-modules",
    "lora_task_type": "the models here are CAUSAL_LM",
    "max_lora_rank": _SERVING,
    "megatron_*": _ONE_GPU,
    "model_init_kwargs": "give --dtype, --revision and --load-in-4bit by their own flags",
    "monteclora_config": _VARIANT,
    "offload_embedding": "the embedding stays on the device; see --max-memory-gib",
    "optim_args": "use --adam-beta1, --adam-beta2, --adam-epsilon and --weight-decay",
    "optim_target_modules": "it belongs to optimizers that are not implemented",
    "pad_to_multiple_of": "rows are laid side by side without padding",
    "pad_token": "nothing is padded, so no token is needed for it",
    "padding_free": "rows are always laid side by side without padding",
    "parallelism_config": _ONE_GPU,
    "peft_config": "give its fields by their flags: --lora-r, --lora-alpha, --target-modules, ...",
    "peft_type": "an adapter is LORA, or none with --full-finetuning",
    "peft_version": "it is a mark in the files that are written",
    "prediction_loss_only": _MEANS,
    "project": "set WANDB_PROJECT or TRACKIO_PROJECT",
    "push_to_hub": _HUB,
    "qalora_group_size": _VARIANT,
    "qat_scheme": "the base is quantised and frozen; nothing trains through rounding",
    "remove_unused_columns": "columns that are not used are never read",
    "resize_model_vocab": "the embedding keeps its rows: write the larger model out first",
    "restore_callback_states_from_checkpoint": "everything that resuming needs is restored",
    "rope_scaling": "config.json of the model says it: edit rope_parameters there",
    "router_aux_loss_coef": "the models here have no router",
    "runtime_config": "nothing of an adapter is moved while it runs",
    "save_on_each_node": _ONE_GPU,
    "save_only_model": "every checkpoint can be resumed from",
    "shuffle_dataset": "the rows of every epoch are shuffled, in Trainer's order",
    "skip_memory_metrics": "peak memory is always reported",
    "target_parameters": "the models here have linears alone: use --target-modules",
    "task_type": "the models here are CAUSAL_LM",
    "tf32": "set torch.backends.cuda.matmul.allow_tf32 from Python",
    "token": "the hub's own is used: `hf auth login`, or HF_TOKEN",
    "torch_compile*": _KERNELS,
    "torch_empty_cache_steps": "nothing is left in the cache that another step would not use",
    "trackio_*": "Trackio writes locally; share a project with its own command",
    "train_sampling_strategy": "the order of the rows is Trainer's random one",
    "truncation_mode": "rows keep their start",
    "trust_remote_code": "no code of a model is ever run",
    "use_bdlora": _VARIANT,
    "use_bnb_nested_quant": _DOUBLE,
    "use_cache": "training keeps no key/value cache, generation always does",
    "use_exact_model_name": "--model is always taken as it is given",
    "use_liger_kernel": _KERNELS,
    "use_peft": "an adapter is trained, or with --full-finetuning the model itself",
    "use_qalora": _VARIANT,
    "velora_config": _VARIANT,
}
# Off or none, any of them asks for what is done anyway, but for these; and so do these values.
_OFF_IS_ANOTHER = (
    "bnb_4bit_use_double_quant", "data_seed", "do_eval", "do_train", "ensure_weight_tying",
    "logging_strategy", "use_bnb_nested_quant", "use_peft",
)  # fmt: skip
_DONE_ANYWAY = {
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": "true",
    "do_train": "true",
    "logging_strategy": "steps",
    "lora_task_type": "causal_lm",
    "peft_type": "lora",
    "remove_unused_columns": "true",
    "task_type": "causal_lm",
    "train_sampling_strategy": "random",
    "truncation_mode": "keep_start",
    "use_bnb_nested_quant": "true",
    "use_peft": "true",
}


def refusal(name: str) -> str:
    """Why the setting of that name (r, hub_token) is refused, or ""."""
    starred = (why for key, why in REFUSED.items() if key[-1] == "*" and name.startswith(key[:-1]))
    return REFUSED.get(name) or next(starred, "")


_ON, _OFF = ("true", "yes", "1", "on", ""), ("false", "no", "0", "off", "none")


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return 0.0


def translate(name: str, value: str | None, known: Mapping[str, object]) -> tuple[str, str | None]:
    """One setting under Hugging Face's name -> (name here, value), or ("", None) for a switch off.

    value: its text, None where none was given. known: the settings that there are. A name that is
    one of them, or that nothing here knows, comes back as it is. Raises UserError with the reason
    for a name that is refused, unless the value asks for what is done anyway ("", None).
    """
    plain = name.replace("-", "_")
    ours = plain if plain in known else ALIASES.get(plain, "")
    if plain == "warmup_ratio" and _number(value) >= 1:
        raise UserError(
            f"{flag(plain)} is {value}; expected a share of the steps below 1, or --warmup-steps N"
        )
    if ours in known:
        return name if ours == plain else ours, VALUES.get(ours, {}).get(
            (value or "").lower(), value
        )
    off = plain.startswith("no_") and plain.removeprefix("no_") in SWITCHES
    switch = SWITCHES.get(plain.removeprefix("no_"))
    if switch and switch[0] in known:
        text = (value or "").lower()
        if text not in _ON + _OFF:
            raise UserError(f"{flag(plain)} is {value!r}; expected true or false")
        return ("", None) if off or text in _OFF else switch
    key = plain if refusal(plain) else plain.removeprefix("no_")
    if "lora_r" in known and (why := refusal(key)):
        text = (value or "on").lower() if key == plain else "no"
        off = text in (*_OFF, "{}", "[]") and key not in _OFF_IS_ANOTHER
        done = _DONE_ANYWAY.get(key)
        if off or text == done or (done == "true" and text in _ON):
            return "", None
        raise UserError(f"{flag(plain)} is not a setting here: {why}")
    return name, value


def translate_flags(argv: list[str], known: Mapping[str, object]) -> list[str]:
    """The command line with Hugging Face's names replaced (`translate`); values follow or `=`."""
    out: list[str] = []
    rest, given = list(argv), dict[str, str]()
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        plain = name.replace("-", "_")
        refused = "lora_r" in known and bool(refusal(plain))
        is_switch = plain.removeprefix("no_") in SWITCHES
        values = VALUES.get(ALIASES.get(plain, plain), {})
        following = "--" if equals or not rest else rest[0]
        takes = values if values else _ON[:-1] + _OFF if is_switch else ()
        looked_at = refused or plain == "warmup_ratio"
        if following.lower() in takes or (looked_at and not following.startswith("--")):
            value = rest.pop(0)
        elif "true" in values and not equals and following.startswith("--"):
            value = "true"
        text = value if value or equals or is_switch or looked_at else None
        new, new_value = translate(name, text, known)
        if not new:
            continue
        ours = new.replace("-", "_").removeprefix("no_")
        said = word.partition("=")[0] if plain in known else word
        if ours in known and given.setdefault(ours, said).replace("_", "-") != said.replace(
            "_", "-"
        ):
            raise UserError(f"{given[ours]} and {said} both give {flag(ours)}; drop one")
        if new == name and new_value == text:
            out.append(word)
        else:
            out += [flag(new)] if new_value is None else [flag(new), new_value]
    return out
