"""Hugging Face's names for settings: what each is called here, or why there is none.

Names that are the same need no entry. Standard library only. The table for readers is
docs/arguments.md; a test compares the three.
"""

from __future__ import annotations

from collections.abc import Mapping

from minisft.config import UserError, flag

# transformers, TRL, PEFT, Unsloth -> the setting here that means the same.
ALIASES = {
    "chat_template_path": "chat_template",
    "dataset_name": "dataset",
    "evaluation_strategy": "eval_strategy",
    "full_determinism": "deterministic",
    "label_smoothing_factor": "label_smoothing",
    "lora_target_modules": "target_modules",
    "loraplus_lr_embedding": "embedding_learning_rate",
    "max_seq_length": "max_length",
    "model_name": "model",
    "model_name_or_path": "model",
    "r": "lora_r",
    "train_dataset": "dataset",
    "warmup_ratio": "warmup_steps",
}
# Switches that choose one value of a setting here; off leaves the setting alone.
SWITCHES = {
    "activation_checkpointing": ("gradient_checkpointing", "block"),
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "use_cpu": ("device", "cpu"),
}
_LATER = "not implemented yet"
_ONE_GPU = "training runs on one device; multi-GPU training is not implemented yet"
_HUB = "nothing is uploaded; use the `hf upload` command on the output directory"
_KERNELS = "the kernels here are used instead"
_MEANS = "no logits are kept: means over tokens are reported"
_ALWAYS_TOKENS = "the loss is always the mean over the tokens of the whole step"
# What Trainer's arguments configure and this loop does not have, and why; a name that ends in *
# stands for all that begin so.
REFUSED = {
    "accelerator_config": "accelerate is not used",
    "activation_checkpointing_kwargs": "--gradient-checkpointing alone decides",
    "activation_offloading": _LATER,
    "auto_find_batch_size": "micro-batches are cut by tokens; lower --per-device-train-batch-size",
    "average_tokens_across_devices": _ALWAYS_TOKENS,
    "batch_eval_metrics": _MEANS,
    "bf16_full_eval": "evaluation computes in --dtype, as training does",
    "bias": "biases of the base stay frozen, as with PEFT's default",
    "data_collator": "from Python: minisft.train(config, batch_fn=collator)",
    "data_seed": "--seed decides the order of the rows",
    "dataloader_drop_last": "the last, shorter step of an epoch is trained, as Trainer does",
    "dataloader_*": "rows are tokenised before the first step; nothing is left to load",
    "dataset_kwargs": "give the settings by their own flags",
    "ddp_*": _ONE_GPU,
    "debug": "use --deterministic, or a debugger",
    "deepspeed": _ONE_GPU,
    "disable_tqdm": "the progress bar appears on a terminal only",
    "do_eval": "give --eval-dataset to evaluate",
    "do_predict": "use scripts/generate.py",
    "do_train": "scripts/train.py always trains",
    "enable_jit_checkpoint": "a checkpoint is always written on SIGTERM",
    "eos_token": "the tokenizer's own is used; edit tokenizer_config.json to change it",
    "eval_accumulation_steps": "no logits are kept, so nothing accumulates",
    "eval_delay": "give --eval-steps",
    "eval_do_concat_batches": _MEANS,
    "eval_on_start": "evaluation before the first step is always made",
    "eval_packing": "evaluation rows are laid side by side without packing; the loss is the same",
    "eval_use_gather_object": _MEANS,
    "fp16_full_eval": "evaluation computes in --dtype, as training does",
    "fsdp*": _ONE_GPU,
    "gradient_checkpointing_kwargs": "--gradient-checkpointing alone decides",
    "group_by_length": "rows are laid side by side without padding; their order is Trainer's",
    "hub_*": _HUB,
    "ignore_data_skip": "resuming needs no skipping: rows are a function of the step",
    "include_for_metrics": _MEANS,
    "include_num_input_tokens_seen": "num_tokens is always counted",
    "label_names": "labels are made from the rows",
    "length_column_name": "lengths are counted",
    "liger_kernel_config": _KERNELS,
    "load_in_8bit": "the base is kept in 4 bits (--load-in-4bit) or in full",
    "local_rank": _ONE_GPU,
    "log_level*": "lines are printed as they come; metrics.jsonl has the numbers",
    "log_on_each_node": _ONE_GPU,
    "logging_first_step": "use --logging-steps 1",
    "logging_nan_inf_filter": "a loss that is not finite ends the run and is never averaged away",
    "logging_strategy": "use --logging-steps",
    "layer_replication": _LATER,
    "layers_pattern": "the models here have one list of layers",
    "loftq_config": _LATER,
    "lora_bias": _LATER,
    "model_init_kwargs": "give --dtype, --revision and --load-in-4bit by their own flags",
    "optim_args": "use --adam-beta1, --adam-beta2, --adam-epsilon and --weight-decay",
    "optim_target_modules": "it belongs to optimizers that are not implemented",
    "pad_to_multiple_of": "rows are laid side by side without padding",
    "pad_token": "nothing is padded, so no token is needed for it",
    "padding_free": "rows are always laid side by side without padding",
    "parallelism_config": _ONE_GPU,
    "peft_config": "give its fields by their flags: --lora-r, --lora-alpha, --target-modules, ...",
    "prediction_loss_only": _MEANS,
    "project": "set WANDB_PROJECT or TRACKIO_PROJECT",
    "push_to_hub": _HUB,
    "remove_unused_columns": "columns that are not used are never read",
    "restore_callback_states_from_checkpoint": "everything that resuming needs is restored",
    "router_aux_loss_coef": "the models here have no router",
    "save_on_each_node": _ONE_GPU,
    "save_only_model": "every checkpoint can be resumed from",
    "shuffle_dataset": "the rows of every epoch are shuffled, in Trainer's order",
    "skip_memory_metrics": "peak memory is always reported",
    "tf32": "set torch.backends.cuda.matmul.allow_tf32 from Python",
    "torch_compile*": _KERNELS,
    "torch_empty_cache_steps": "nothing is left in the cache that another step would not use",
    "trackio_*": "Trackio writes locally; share a project with its own command",
    "train_sampling_strategy": "the order of the rows is Trainer's random one",
    "truncation_mode": "rows keep their start",
    "trust_remote_code": "no code of a model is ever run",
    "use_cache": "training keeps no key/value cache, generation always does",
    "use_gradient_checkpointing": "use --gradient-checkpointing",
    "use_liger_kernel": _KERNELS,
}


def refusal(name: str) -> str:
    """Why the setting of that name (r, hub_token) is refused, or ""."""
    starred = (why for key, why in REFUSED.items() if key[-1] == "*" and name.startswith(key[:-1]))
    return REFUSED.get(name) or next(starred, "")


_ON, _OFF = ("true", "yes", "1", "on", ""), ("false", "no", "0", "off", "none")


def translate(name: str, value: str | None, known: Mapping[str, object]) -> tuple[str, str | None]:
    """One setting under Hugging Face's name -> (name here, value), or ("", None) for a switch off.

    value: its text, None where none was given. known: the settings that there are. A name that is
    one of them, or that nothing here knows, comes back as it is. Raises UserError with the reason
    for a name that is refused.
    """
    plain = name.replace("-", "_")
    if plain in known:
        return name, value
    if ALIASES.get(plain) in known:
        return ALIASES[plain], value
    off = plain.startswith("no_") and plain.removeprefix("no_") in SWITCHES
    switch = SWITCHES.get(plain.removeprefix("no_"))
    if switch and switch[0] in known:
        text = (value or "").lower()
        if text not in _ON + _OFF:
            raise UserError(f"{flag(plain)} is {value!r}; expected true or false")
        return ("", None) if off or text in _OFF else switch
    if "lora_r" in known and (why := refusal(plain)):
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
        is_switch = name.replace("-", "_").removeprefix("no_") in SWITCHES
        if is_switch and not equals and rest and rest[0].lower() in _ON[:-1] + _OFF:
            value = rest.pop(0)
        new, new_value = translate(name, value if equals or is_switch else None, known)
        if new == name:
            out.append(word)
        elif new:
            if given.setdefault(new, word) != word:
                raise UserError(f"{given[new]} and {word} both give {flag(new)}; drop one")
            out += [flag(new)] if new_value is None else [flag(new), new_value]
    return out
