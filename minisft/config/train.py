"""Every setting of a run: `TrainConfig`, the flags of scripts/train.py."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.config.errors import UserError, flag
from minisft.config.lora import LoraConfig, matches
from minisft.config.model import EMBEDDING_NAMES, LINEAR_NAMES

DATASET_FORMATS = (
    "auto", "text", "prompt-completion", "messages", "sharegpt", "alpaca", "input_ids",
)  # fmt: skip
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd", "lion_8bit")
# Hugging Face's names of the same rules.
_SAME_OPTIMIZER = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
}
# What Trainer and PEFT give for these from Python, and how YAML reads a bare `no`.
_SWITCHED: dict[str, dict[bool, str]] = {
    "eval_strategy": {False: "no"},
    "gradient_checkpointing": {True: "full", False: "none"},
    "init_lora_weights": {True: "default"},
    "resume_from_checkpoint": {True: "auto", False: ""},
    "save_strategy": {False: "no"},
}
WHOLE_NUMBERS = ("layers_to_transform", "trainable_token_indices")  # lists of them
LOGGERS = ("tensorboard", "wandb", "trackio")
EVAL_METRICS = ("loss", "mean_token_accuracy", "entropy")
_WAVES = ("linear", "cosine", "1-sqrt")
# Learning-rate schedules, and what --lr-scheduler-kwargs may say to each.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"),
        *("warmup_type", "decay_type"),
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one fine-tuning run; each field is a flag of scripts/train.py.

    Names and meanings are Hugging Face's (TRL, PEFT, Trainer) wherever they have one.
    """

    # --- model
    model: str = ""
    """Base model: a local directory (config.json, safetensors, tokenizer.json) or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    """Compute dtype: auto, bfloat16, float16 or float32. auto is bfloat16 on GPUs that have it,
    float16 on those that do not, float32 on CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    load_in_4bit: bool = True
    """QLoRA: keep the frozen linears in 4 bits (NF4, double quantisation) and train the adapter
    through them. Always off with --full-finetuning, which trains 32-bit weights."""
    max_length: int = 2048
    """Longest row in tokens; longer rows are truncated, and counted."""

    # --- what is trained
    lora_r: int = 16
    """LoRA rank."""
    lora_alpha: float = 16
    """LoRA scale numerator: the update is scaled by alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA branch."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    target_modules: tuple[str, ...] = LINEAR_NAMES
    """Module name suffixes, `all-linear`, or one `re:PATTERN`. embed_tokens and lm_head here mean
    trained copies, as in --modules-to-save."""
    modules_to_save: tuple[str, ...] = ()
    """embed_tokens and/or lm_head, trained in full beside the adapter."""
    use_dora: bool = False
    """DoRA: train the length of each output row of an adapted matrix beside its direction."""
    rank_pattern: tuple[str, ...] = ()
    """Ranks of single modules, e.g. `q_proj=8 layers.0.mlp.up_proj=32` (names or expressions)."""
    alpha_pattern: tuple[str, ...] = ()
    """lora_alpha of single modules, likewise."""
    layers_to_transform: tuple[str, ...] = ()
    """Numbers of the layers to adapt; left out, all."""
    exclude_modules: tuple[str, ...] = ()
    """Names, suffixes, or one `re:PATTERN`, that are not adapted though the targets name them."""
    lora_embeddings: bool = False
    """Adapt the embedding too, as embed_tokens among PEFT's targets; a tied head stays as it is."""
    trainable_token_indices: tuple[str, ...] = ()
    """Ids of single tokens whose rows of the embedding (and of a tied head) are trained in full."""
    init_lora_weights: str = "default"
    """Start of A: default (uniform, PEFT's) or gaussian (standard deviation 1 / r), with B zero. Of
    both: pissa (the largest singular values of the weight; slow on large models), pissa_niter_4
    (the same, nearly, and fast) or olora (a QR decomposition). These train beside what is left of
    the weight; the file written is a plain adapter of twice the rank."""
    full_finetuning: bool = False
    """Train every weight instead of an adapter."""

    # --- data
    dataset: tuple[str, ...] = ()
    """Training rows: a .jsonl, .json, .csv or .parquet file, or a hub id. Several are trained
    together: each row once an epoch, or by weights, as `a.jsonl:0.7 b.jsonl:0.3`."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    dataset_format: str = "auto"
    """auto (by the columns), text, prompt-completion, messages, sharegpt, alpaca or input_ids."""
    eval_dataset: str = ""
    """Rows to evaluate on, before the first step and after the last; a file or a hub id."""
    dataset_text_field: str = "text"
    """Column that holds the text of plain-text rows."""
    columns: tuple[str, ...] = ()
    """Column renames, e.g. `prompt=question completion=answer`. Among several datasets,
    and for the one to evaluate on, a column that is not there is not renamed."""
    chat_template: str = ""
    """Chat template in place of the tokenizer's: a Jinja file, or chatml, llama-3, alpaca or plain.
    It is saved with the result."""
    completion_only_loss: bool | None = None
    """Train on the completion only, or (--no-completion-only-loss) on the prompt too; by default on
    the completion, where rows have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Train on the assistant's turns of a chat only: those that the template's generation
    blocks mark, or, where it has none, those found by rendering the beginnings of the chat."""
    instruction_part: str = ""
    """With --response-part: the text behind which, in the rendered row, training stops."""
    response_part: str = ""
    """Train only on what follows this text, up to the next --instruction-part or the end."""
    overlong: str | None = None
    """Rows longer than --max-length: truncate (the default), drop, split or error. By default
    --packing-strategy bfd_split and wrapped split them."""
    skip_bad: bool = False
    """Leave out and count malformed rows instead of stopping at the first."""
    dataset_num_proc: int = 1
    """Processes that render and tokenise; the result is the same."""
    dataset_cache_dir: str = ""
    """Keep tokenised rows there, under a hash of all that shapes them, for this and other runs."""
    preview: int = 0
    """Print the first N rows as the model sees them, trained tokens marked, with their ids."""
    preview_json: str = ""
    """Write the rows of --preview (without it: all) to this file, for tools."""
    dry_run: bool = False
    """Refuse what the run would refuse before its first step, with a sample of the rows and the
    headers of the weights; tell steps, pass and memory; stop. The output directory stays as it is.
    """
    packing: bool = False
    """Pack several rows into one of max_length tokens, document boundaries kept."""
    packing_strategy: str = "bfd"
    """bfd (best-fit decreasing), bfd_split or wrapped."""

    # --- the run
    output_dir: str = "outputs"
    """Where checkpoints, logs and the final adapter go."""
    overwrite_output_dir: bool = False
    """Start anew in a directory that holds a run already (its results are removed)."""
    resume_from_checkpoint: str = ""
    """`auto` for the newest complete checkpoint in the output directory, or a checkpoint's path."""
    max_steps: int = -1
    """Optimizer steps; -1 means num_train_epochs."""
    num_train_epochs: float = 1.0
    """Passes over the rows."""
    per_device_train_batch_size: int = 2
    """Rows per micro-batch."""
    gradient_accumulation_steps: int = 4
    """Micro-batches per optimizer step. The loss is the token mean over the whole step."""
    optim: str = "adamw"
    """adamw (adamw_torch, adamw_torch_fused), adamw_8bit, paged_adamw_8bit, adafactor, sgd or
    lion_8bit. Trained embeddings, heads, norms and biases keep 32-bit state under every one."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of trained embeddings and heads, on the same schedule; left out, theirs is
    --learning-rate."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of the lora_B matrices over that of the rest (LoRA+)."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are not decayed."""
    warmup_steps: float = 0
    """Steps of linear warm-up; below 1, a share of all steps."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial, constant,
    constant_with_warmup, inverse_sqrt or warmup_stable_decay."""
    lr_scheduler_kwargs: tuple[str, ...] = ()
    """More of the schedule, e.g. `num_cycles=2` or `min_lr=1e-5`, under transformers' names."""
    loss_type: str = "nll"
    """nll, or dft: each token's loss weighted by its probability (arXiv:2508.05629)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    neftune_noise_alpha: float = 0.0
    """Uniform noise of up to alpha / sqrt(tokens of the document * hidden size) on the embeddings
    in training (arXiv:2310.05914)."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 measures without clipping."""
    adam_beta1: float = 0.9
    """AdamW beta1."""
    adam_beta2: float = 0.999
    """AdamW beta2."""
    adam_epsilon: float = 1e-8
    """AdamW epsilon."""
    gradient_checkpointing: str = "auto"
    """What each layer keeps for the backward pass. auto: the fastest that fits the memory. none:
    all (no matrix product is run again). full (or block): its input alone. Between the two:
    recompute_gate_up, recompute_gate_up+qkv, all_but_attention. With +offload what is kept waits in
    host memory (with none: the residuals and attention's output); offload: all of it. At most 60 %
    of the memory that the host has left is used so."""
    step_impl: str = "auto"
    """Which pass computes gradients: explicit (written by hand, captured in CUDA graphs), autograd,
    or auto: explicit on a GPU wherever it covers the run."""
    attn_implementation: str = "auto"
    """Attention over rows of several documents on a GPU. auto: the flash attention inside torch.
    flash_attention_3, flash_attention_4: that package, where you have installed it. Rows of one
    document each go through cuDNN."""
    max_memory_gib: float = 0.0
    """GPU memory that auto may plan with; 0 is all that is free."""
    micro_batch_tokens: int = 0
    """Tokens computed at a time by the explicit pass; 0 chooses. Loss and gradient do not depend on
    it: they are those of the token mean over the step."""
    stop_on_loss_spike: bool = False
    """Stop (exit code 3) after five steps in a row whose loss is more than twice the mean of the
    last 100 and 1 above it; a spike always gives a warning."""
    deterministic: bool = False
    """Use only algorithms that give the same bits in every process (on a GPU: slower)."""
    seed: int = 3407
    """Seed of row order, adapter initialisation and dropout."""
    logging_steps: int = 1
    """Write a metrics line every N steps (the mean over them)."""
    report_to: tuple[str, ...] = ()
    """tensorboard, wandb and/or trackio, beside metrics.jsonl, which is always written."""
    run_name: str = ""
    """Name of the run in them; left out, that of the output directory."""
    logging_dir: str = ""
    """Where they write; left out, into the output directory. Not for trackio: $TRACKIO_DIR."""
    save_strategy: str = "steps"
    """`steps` writes a checkpoint every save_steps, `epoch` after each pass over the rows, `best`
    where an evaluation is the best so far, each also at the end; `no` only when stopped."""
    save_steps: int = 500
    """Steps between checkpoints under --save-strategy steps."""
    save_total_limit: int = 0
    """Keep at most N checkpoints, the newest and the best always among them; 0 keeps all."""
    eval_strategy: str = "no"
    """With --eval-dataset: `no` evaluates before the first step and after the last; `steps` also
    every eval_steps, `epoch` also after each pass over the rows."""
    eval_steps: int = 0
    """Steps between evaluations under --eval-strategy steps; 0 means logging_steps."""
    per_device_eval_batch_size: int = 0
    """Rows evaluated side by side; 0 means per_device_train_batch_size. The loss is the mean over
    tokens and does not depend on it."""
    eval_generate: int = 0
    """Answer the first N eval prompts greedily at every evaluation: samples.jsonl; count exact
    matches and ends of turn."""
    save_merged: bool = False
    """Also write the adapter merged into its base (as scripts/merge.py does) to merged/."""
    load_best_model_at_end: bool = False
    """Export the weights of the best evaluation, not the last; each best one gets a checkpoint."""
    metric_for_best_model: str = "loss"
    """What tells the best evaluation: loss, mean_token_accuracy or entropy (or eval_...)."""
    greater_is_better: bool | None = None
    """Whether a greater metric is better; left out, it is unless the metric is the loss."""
    early_stopping_patience: int = 0
    """Stop once N evaluations in a row were no better than the best; 0 never does."""
    early_stopping_threshold: float = 0.0
    """How much better than the best an evaluation must be to count as better for that."""

    def __post_init__(self):
        for name in _SWITCHED:
            object.__setattr__(self, name, switched(name, getattr(self, name)))
        if isinstance(self.dataset, (str, Path)):
            object.__setattr__(self, "dataset", (str(self.dataset),) if self.dataset else ())
        self._check_types()
        if self.full_finetuning:
            object.__setattr__(self, "load_in_4bit", False)
        object.__setattr__(self, "dataset", tuple(map(str, self.dataset)))
        # The command line gives "a,b" as well as "a b"; Python callers may give one string.
        for name in (
            "target_modules",
            "modules_to_save",
            "columns",
            "lr_scheduler_kwargs",
            "report_to",
            "exclude_modules",
        ):
            object.__setattr__(self, name, split_list(getattr(self, name), flag(name)))
        for name in ("rank_pattern", "alpha_pattern"):  # a comma may be part of an expression
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            items = split_list(value if isinstance(value, str) else [str(i) for i in value])
            object.__setattr__(self, name, items)
        object.__setattr__(self, "report_to", tuple(n for n in self.report_to if n != "none"))
        object.__setattr__(self, "optim", _SAME_OPTIMIZER.get(self.optim, self.optim))
        start = self.init_lora_weights
        if not re.fullmatch(r"default|gaussian|olora|pissa(_niter_\d{1,3})?", start):
            raise UserError(
                f"--init-lora-weights is {start!r}; expected one of default, gaussian, pissa, "
                "pissa_niter_N (such as pissa_niter_4), olora"
            )
        choices = {
            "dtype": ("auto", "bfloat16", "float16", "float32"),
            "packing_strategy": ("bfd", "bfd_split", "wrapped"),
            "optim": OPTIMIZERS,
            "loss_type": ("nll", "dft"),
            "dataset_format": DATASET_FORMATS,
            "overlong": (None, "truncate", "drop", "split", "error"),
            "lr_scheduler_type": tuple(SCHEDULES),
            "gradient_checkpointing": (
                "auto",
                "none",
                "recompute_gate_up",
                "recompute_gate_up+qkv",
                "all_but_attention",
                "full",
                "block",
                "none+offload",
                "offload",
                "recompute_gate_up+offload",
                "recompute_gate_up+qkv+offload",
                "full+offload",
            ),
            "step_impl": ("auto", "explicit", "autograd"),
            "attn_implementation": ("auto", "flash_attention_3", "flash_attention_4"),
            "eval_strategy": ("no", "steps", "epoch"),
            "save_strategy": ("no", "steps", "epoch", "best"),
            "metric_for_best_model": EVAL_METRICS + tuple(f"eval_{m}" for m in EVAL_METRICS),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                known = ", ".join(filter(None, allowed))
                raise UserError(f"{flag(name)} is {value!r}; expected one of {known}")
        for name in self.report_to:
            if name not in LOGGERS:
                known = ", ".join(("none", *LOGGERS))
                raise UserError(f"--report-to is {name!r}; expected some of {known}")
        at_least = {
            "max_length": 2, "lora_r": 1, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 1,
            "save_total_limit": 0, "learning_rate": 0, "weight_decay": 0, "warmup_steps": 0,
            "lora_dropout": 0, "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0,
            "eval_generate": 0, "eval_steps": 0, "max_memory_gib": 0,
            "micro_batch_tokens": 0, "embedding_learning_rate": 0,
            "loraplus_lr_ratio": 0, "per_device_eval_batch_size": 0, "early_stopping_patience": 0,
            "early_stopping_threshold": 0, "label_smoothing": 0, "neftune_noise_alpha": 0,
            "preview": 0, "dataset_num_proc": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not value >= least or not math.isfinite(value):
                raise UserError(f"{flag(name)} is {value}; expected at least {least}")
        for name in ("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; expected below 1")
        if not self.lora_alpha > 0 or not math.isfinite(self.lora_alpha):
            raise UserError(f"--lora-alpha is {self.lora_alpha}; expected a number above 0")
        if self.lora_r > 65536:
            raise UserError(f"--lora-r is {self.lora_r}; expected at most 65536")
        read = [name for name, _ in self.sources] + [self.eval_dataset]
        if self.preview_json and Path(self.preview_json).resolve() in [
            Path(name).resolve() for name in read
        ]:
            raise UserError(
                f"--preview-json {self.preview_json} is a file of rows that is read; name another"
            )
        if not self.max_grad_norm >= 0 or not math.isfinite(self.max_grad_norm):
            raise UserError(f"--max-grad-norm is {self.max_grad_norm}; expected 0 or more")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(
                f"--max-steps is {self.max_steps}; expected a positive number, or -1 for epochs"
            )
        if not self.num_train_epochs > 0 or not math.isfinite(self.num_train_epochs):
            raise UserError(f"--num-train-epochs is {self.num_train_epochs}; expected more than 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}; expected 0 to 2**63 - 1")
        for name in self.modules_to_save:
            if name not in EMBEDDING_NAMES:
                raise UserError(
                    f"--modules-to-save is {name!r}; expected {' and/or '.join(EMBEDDING_NAMES)}"
                )
        if self.full_finetuning and self.modules_to_save:
            raise UserError(
                "--modules-to-save has no meaning with --full-finetuning, which trains every "
                "weight; drop one"
            )
        if not self.output_dir:
            raise UserError("--output-dir is empty; give a directory for what the run writes")
        self._check_idle()
        if self.eval_strategy != "no" and not self.eval_dataset:
            raise UserError(f"--eval-strategy {self.eval_strategy} needs --eval-dataset; give one")
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and self.eval_strategy == "no":
                raise UserError(f"{flag(name)} needs --eval-strategy steps or epoch; give one")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise UserError("--save-strategy best needs --eval-strategy steps or epoch; give one")
        if self.load_best_model_at_end and self.save_strategy == "no":
            raise UserError(
                "--load-best-model-at-end needs checkpoints, but --save-strategy is no; use best"
            )
        if self.eval_generate and not self.eval_dataset:
            raise UserError("--eval-generate takes its prompts from --eval-dataset; give one")
        if self.loraplus_lr_ratio == 0:
            raise UserError(
                "--loraplus-lr-ratio is 0, so lora_B would never change; expected a number above "
                "0, or none: LoRA+ is off then"
            )
        if self.loraplus_lr_ratio is not None and self.full_finetuning:
            raise UserError("--loraplus-lr-ratio needs an adapter; drop it or --full-finetuning")
        self.lora, self.column_map  # pyright: ignore  # noqa: B018  (raise where malformed)
        self.sources  # noqa: B018  (raises on malformed weights)
        self.scheduler_options  # noqa: B018

    def _check_idle(self) -> None:
        """Refuse a setting that the others leave without effect: nothing asked for is dropped."""
        lora = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
        lora += ("save_merged", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights")
        lora += ("layers_to_transform", "exclude_modules", "trainable_token_indices")
        lora += ("lora_embeddings",)
        idle = [(name, "full_finetuning", "drop one") for name in lora if self.full_finetuning]
        if not self.packing:
            idle.append(("packing_strategy", "no_packing", "add --packing"))
        if self.eval_strategy != "steps":
            remedy = "add --eval-strategy steps"
            idle.append(("eval_steps", f"eval_strategy {self.eval_strategy}", remedy))
        if self.save_strategy != "steps":
            remedy = "take --save-strategy steps"
            idle.append(("save_steps", f"save_strategy {self.save_strategy}", remedy))
        if not self.keeps_best:
            cause, remedy = "no_load_best_model_at_end", "add --load-best-model-at-end"
            idle += [(n, cause, remedy) for n in ("metric_for_best_model", "greater_is_better")]
        if not self.early_stopping_patience:
            remedy = "give a patience"
            idle.append(("early_stopping_threshold", "early_stopping_patience 0", remedy))
        if not self.report_to:
            names = ("run_name", "logging_dir")
            idle += [(n, "report_to none", "name a logger there") for n in names]
        if not self.eval_dataset:
            idle.append(("per_device_eval_batch_size", "eval_dataset ''", "give eval rows"))
        if self.loss_type == "dft":
            idle.append(("label_smoothing", "loss_type dft", "drop one"))
        if self.lr_scheduler_type == "constant":
            remedy = "take constant_with_warmup"
            idle.append(("warmup_steps", "lr_scheduler_type constant", remedy))
        if self.resume_from_checkpoint:
            remedy = "continue the run, or start over"
            idle.append(("overwrite_output_dir", "resume_from_checkpoint", remedy))
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, cause, remedy in idle:
            if (value := getattr(self, name)) != defaults[name]:
                shown = "" if value is True else f" {value}"
                raise UserError(f"{flag(name)}{shown} has no effect with {flag(cause)}; {remedy}")

    def _check_types(self) -> None:
        """Python callers get the command line's strictness; paths may be pathlib's."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind == "str" and isinstance(value, Path):
                object.__setattr__(self, field.name, str(value))
                continue
            dicts = ("columns", "lr_scheduler_kwargs", "rank_pattern", "alpha_pattern")
            if field.name in dicts and isinstance(value, dict):
                value = tuple(f"{k}={v}" for k, v in value.items())
                object.__setattr__(self, field.name, value)
            expected = {
                "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,),
                "str | None": (str, type(None)), "tuple[str, ...]": (str, tuple, list),
                "float | None": (int, float, type(None)), "bool | None": (bool, type(None)),
            }[kind]  # fmt: skip
            number = kind in ("int", "float", "float | None")
            if not isinstance(value, expected) or (number and isinstance(value, bool)):
                wanted = describe_type(field.name, kind)
                raise UserError(f"{flag(field.name)} is {value!r}; expected {wanted}")

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter's settings, or None with full_finetuning."""
        if self.full_finetuning:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            use_dora=self.use_dora,
            init_lora_weights=self.init_lora_weights,
            rank_pattern=tuple((k, int(v)) for k, v in self._pattern("rank_pattern")),
            alpha_pattern=self._pattern("alpha_pattern"),
            layers_to_transform=self._whole_numbers("layers_to_transform", "numbers of layers"),
            trainable_token_indices=self._whole_numbers("trainable_token_indices", "token ids"),
            exclude_modules=self.exclude_modules,
            lora_embeddings=self.lora_embeddings,
        )

    def _pattern(self, name: str) -> tuple[tuple[str, float], ...]:
        """`--rank-pattern q_proj=8` as (("q_proj", 8.0),)."""
        pairs = []
        for item in getattr(self, name):
            key, _, text = item.rpartition("=")
            value = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
            if not key or value <= 0 or (name == "rank_pattern" and value != int(value)):
                kind = "a whole number" if name == "rank_pattern" else "a number"
                raise UserError(f"{flag(name)} is {item!r}; expected MODULE={kind} above 0")
            matches(key, "")
            pairs.append((key, value))
        return tuple(pairs)

    def _whole_numbers(self, name: str, what: str) -> tuple[int, ...]:
        items = getattr(self, name)
        for item in items:
            if not item.isdecimal():
                raise UserError(f"{flag(name)} is {item!r}; expected {what}, from 0")
        if len(set(map(int, items))) != len(items):
            raise UserError(f"{flag(name)} is {' '.join(items)}; expected each once")
        return tuple(int(item) for item in items)

    @property
    def sources(self) -> list[tuple[str, float | None]]:
        """`--dataset a.jsonl:0.7 b.jsonl:0.3` as [("a.jsonl", 0.7), ("b.jsonl", 0.3)].

        None where no weights are given. Weights sum to 1.
        """
        found: list[tuple[str, float | None]] = []
        for item in self.dataset:
            name, _, weight = item.rpartition(":")
            if not name or not _is_number(weight) or Path(item).exists():
                found.append((item, None))
                continue
            if not 0 < float(weight) < math.inf:
                raise UserError(f"--dataset is {item!r}; expected a weight above 0")
            found.append((name, float(weight)))
        given = [weight for _, weight in found if weight is not None]
        if given and len(given) != len(found):
            raise UserError(
                f"--dataset is {' '.join(self.dataset)}; give every dataset a weight, or none"
            )
        total = sum(given)
        return [(name, None if weight is None else weight / total) for name, weight in found]

    @property
    def base_name(self) -> str:
        """What an adapter says of its base: the hub id, or the directory as an absolute path."""
        path = Path(self.model).expanduser()
        return str(path.resolve()) if path.is_dir() else self.model

    @property
    def serves_in_4bit(self) -> bool:
        """Whether the adapter belongs on a base in 4 bits: that it was trained through, unless this
        one is quantised without the part that the adapter started as."""
        return self.load_in_4bit and not (self.lora and self.lora.splits_weights)

    @property
    def eval_batch_size(self) -> int:
        """Rows evaluated side by side."""
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    @property
    def keeps_best(self) -> bool:
        """Whether the run depends on which evaluation is the best."""
        return bool(
            self.load_best_model_at_end
            or self.early_stopping_patience
            or self.save_strategy == "best"
        )

    @property
    def best_metric(self) -> tuple[str, bool]:
        """("eval_loss", False): what tells the best evaluation, and whether greater is better."""
        name = self.metric_for_best_model.removeprefix("eval_")
        greater = self.greater_is_better
        return f"eval_{name}", name != "loss" if greater is None else greater

    @property
    def column_map(self) -> dict[str, str]:
        """`--columns prompt=question` as {"prompt": "question"}."""
        pairs = [item.split("=", 1) for item in self.columns]
        for item, pair in zip(self.columns, pairs, strict=True):
            if len(pair) != 2 or not all(pair):
                raise UserError(
                    f"--columns is {item!r}; expected NAME=COLUMN, such as prompt=question"
                )
        if len({ours for ours, _ in pairs}) < len(pairs):
            raise UserError(f"--columns is {' '.join(self.columns)}; expected each NAME once")
        return {ours: theirs for ours, theirs in pairs if ours != theirs}

    @property
    def scheduler_options(self) -> dict[str, Any]:
        """`--lr-scheduler-kwargs num_cycles=2` as {"num_cycles": 2.0}, checked for the schedule."""
        kind, given = self.lr_scheduler_type, {}
        for item in self.lr_scheduler_kwargs:
            name, _, text = item.partition("=")
            if name not in SCHEDULES[kind]:
                known = ", ".join(SCHEDULES[kind]) or "none"
                raise UserError(
                    f"--lr-scheduler-kwargs is {item!r}; expected NAME=VALUE, and "
                    f"--lr-scheduler-type {kind} knows these names: {known}"
                )
            if name.endswith("_type"):
                if text not in _WAVES:
                    raise UserError(
                        f"--lr-scheduler-kwargs is {item!r}; expected one of {', '.join(_WAVES)}"
                    )
                given[name] = text
                continue
            try:
                given[name] = float(text)
            except ValueError:
                given[name] = math.nan
            if not math.isfinite(given[name]) or given[name] < 0:
                raise UserError(f"--lr-scheduler-kwargs is {item!r}; expected a number, 0 or more")
        if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
            raise UserError(
                "--lr-scheduler-type warmup_stable_decay needs --lr-scheduler-kwargs "
                "num_decay_steps=N"
            )
        if kind == "cosine_with_min_lr" and ("min_lr" in given) == ("min_lr_rate" in given):
            raise UserError(
                "--lr-scheduler-type cosine_with_min_lr needs --lr-scheduler-kwargs min_lr=RATE or "
                "min_lr_rate=SHARE, and not both"
            )
        if "min_lr" in given and not self.learning_rate > given["min_lr"]:
            raise UserError(
                f"--lr-scheduler-kwargs min_lr={given['min_lr']:g} is not below --learning-rate "
                f"{self.learning_rate:g}"
            )
        if kind == "polynomial" and not self.learning_rate > given.get("lr_end", 1e-7):
            raise UserError(
                f"--lr-scheduler-type polynomial goes down to lr_end={given.get('lr_end', 1e-7):g}"
                f", which is not below --learning-rate {self.learning_rate:g}"
            )
        return given


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# What the items of a list are, where they are no names.
_ITEMS = {
    "trainable_token_indices": "token ids",
    "layers_to_transform": "numbers of layers",
    "columns": "NAME=COLUMN",
    "lr_scheduler_kwargs": "NAME=VALUE",
    "rank_pattern": "MODULE=RANK",
    "alpha_pattern": "MODULE=ALPHA",
    "report_to": f"{', '.join(LOGGERS)}, or none",
}


def switched(name: str, value: Any) -> Any:
    """A setting's True or False as the value of ours that it means; all else as it is.

    Of two settings the command line too gives them, as words.
    """
    on = value
    if name in ("init_lora_weights", "resume_from_checkpoint") and isinstance(value, str):
        on = {"true": True, "false": False}.get(value.lower())
    return _SWITCHED.get(name, {}).get(on, value) if isinstance(on, bool) else value


def describe_type(name: str, kind: str) -> str:
    """The type of a setting for a message: ("report_to", "tuple[str, ...]") -> "a list of ..."."""
    items = _ITEMS.get(name, "names")
    return kind.replace("tuple[str, ...]", f"a list of {items}").replace(" | None", " or None")


def split_list(value: str | tuple[str, ...] | list[str], name: str = "") -> tuple[str, ...]:
    """("a,b", "c") or "a,b,c" -> ("a", "b", "c"); a `re:` pattern keeps its commas.

    name: the flag, for UserError about an item that is no string.
    """
    items = [value] if isinstance(value, str) else list(value)
    if wrong := [item for item in items if not isinstance(item, str)]:
        raise UserError(f"{name} holds {wrong[0]!r}; expected a list of strings")
    if any(item.startswith("re:") for item in items):
        return tuple(items)
    return tuple(part for item in items for part in item.split(",") if part)
