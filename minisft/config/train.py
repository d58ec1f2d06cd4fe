"""`TrainConfig`, the settings of a training run: its fields are the flags of scripts/train.py.

Its methods check combinations of settings, and its properties derive values from settings.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from minisft.config import fields
from minisft.config.errors import UserError, flag, wrong
from minisft.config.fields import Check, Fixed, Free, Idle, Items, above, at_least
from minisft.config.lora import LoraConfig, matches
from minisft.config.model import EMBEDDING_NAMES, LINEAR_NAMES

Names = tuple[str, ...]
Format = Literal[
    "auto", "text", "prompt-completion", "messages", "sharegpt", "alpaca", "input_ids"
]  # fmt: skip
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd", "lion_8bit"]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
SCHEDULES: tuple[str, ...] = get_args(Schedule)
Checkpointing = Literal[
    "auto", "none", "recompute_gate_up", "recompute_gate_up+qkv", "all_but_attention", "full",
    "block", "none+offload", "offload", "recompute_gate_up+offload",
    "recompute_gate_up+qkv+offload", "full+offload",
]  # fmt: skip
AttentionImpl = Literal["auto", "flash_attention_3", "flash_attention_4"]
SaveStrategy = Literal["no", "steps", "epoch", "best"]
Metric = Literal["loss", "mean_token_accuracy", "entropy"]
EVAL_METRICS: tuple[str, ...] = get_args(Metric)
BestMetric = Literal[Metric, "eval_loss", "eval_mean_token_accuracy", "eval_entropy"]
# Checks of the values of settings.
_SHARE = Check(lambda x: 0 <= x < 1, "at least 0 and below 1")
_RANK = Check(lambda r: 1 <= r <= 65536, "at least 1 and at most 65536")
_STARTS = Check(
    re.compile(r"default|gaussian|olora|pissa(_niter_\d{1,3})?").fullmatch,
    "one of default, gaussian, pissa, pissa_niter_N (such as pissa_niter_4), olora",
)
_SOME = Check(lambda n: n == -1 or n > 0, "a positive number, or -1 for epochs")
_SEED = Check(lambda n: 0 <= n < 2**63, "0 to 2**63 - 1")
# Descriptions of the items of list settings.
_COPIES = Items("embed_tokens and/or lm_head", EMBEDDING_NAMES)
# Integral also accepts numpy's integers, which are not int.
_LAYERS = Items("numbers of layers", also=Integral)
_TOKENS = Items("token ids", also=Integral)
_LOGGERS = Items("none, tensorboard, wandb, trackio", ("none", "tensorboard", "wandb", "trackio"))
# Reasons why a setting has no effect. With a remedy this is an error, without it a warning.
_FULL = Idle("full_finetuning", (True,), "drop one")
_PACKING = Idle("packing", (False,), "add --packing")
_BEST = Idle("keeps_best", (False,), "add --load-best-model-at-end", "--no-load-best-model-at-end")
_LOGGER = Idle("report_to", ((),), "name a logger there")
_ROWS = Idle("eval_dataset", ("",), "give eval rows")
_PATIENCE = Idle("early_stopping_patience", (0,), "give a patience")
_RESUME = Idle("resume_from_checkpoint", ("",), "continue the run, or start over", unless=True)
_SAVE_STEPS = Idle("save_strategy", ("steps",), "take --save-strategy steps", unless=True)
_EVAL_STEPS = Idle("eval_strategy", ("steps",), "add --eval-strategy steps", unless=True)
_CONSTANT = Idle("lr_scheduler_type", ("constant",), "take constant_with_warmup")
_DFT = Idle("loss_type", ("dft",), "drop one")
_BETAS = Idle("optim", ("sgd", "adafactor"), why="--optim {optim} has none")
_EPSILON = Idle("optim", ("sgd", "adafactor", "lion_8bit"), why="--optim {optim} has none")
_EPOCHS = Idle("max_steps", (-1,), why="--max-steps {max_steps} is given", unless=True)
_TRACKIO = Idle("report_to", (("trackio",),), why="trackio writes to its own, $TRACKIO_DIR")
_UNSAVED = Idle("save_strategy", ("no",), why="--save-strategy no writes no checkpoints")
# Allowed values of the schedule options warmup_type and decay_type.
_WAVES = ("linear", "cosine", "1-sqrt")
# Schedule -> options that --lr-scheduler-kwargs may set; other schedules have no options.
_SCHEDULE_OPTIONS = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles", "warmup_type",
        "decay_type",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one fine-tuning run; each field is a flag of scripts/train.py.

    Names and meanings are Hugging Face's (TRL, PEFT, Trainer) wherever they have one.
    """

    # --- model
    model: Annotated[str, Free] = ""
    """Base model: a local directory (config.json, safetensors, tokenizer.json) or a hub id."""
    revision: Annotated[str | None, Free] = None
    """Branch, tag or commit of a hub model."""
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Fixed] = "auto"
    """Compute dtype: auto, bfloat16, float16 or float32. auto is bfloat16 on GPUs that support it,
    float16 on other GPUs, float32 on CPU."""
    device: Annotated[str, Free] = "auto"
    """auto, cpu, cuda or cuda:N."""
    load_in_4bit: Annotated[bool, Fixed] = True
    """QLoRA: keep the frozen linears in 4 bits (NF4, double quantisation) and train the adapter
    through them. Always off with --full-finetuning, which trains 32-bit weights."""
    max_length: Annotated[int, Fixed, at_least(2)] = 2048
    """Longest row in tokens; longer rows are truncated, and counted."""

    # --- what is trained
    lora_r: Annotated[int, Fixed, _RANK, _FULL] = 16
    """LoRA rank."""
    lora_alpha: Annotated[float, Fixed, above(0), _FULL] = 16
    """LoRA scale numerator: the update is scaled by alpha / r."""
    lora_dropout: Annotated[float, Fixed, _SHARE, _FULL] = 0.0
    """Dropout on the input of the LoRA branch."""
    use_rslora: Annotated[bool, Fixed, _FULL] = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    target_modules: Annotated[Names, Fixed, _FULL] = LINEAR_NAMES
    """Module name suffixes, `all-linear`, or one `re:PATTERN`. embed_tokens and lm_head here mean
    trained copies, as in --modules-to-save."""
    modules_to_save: Annotated[Names, Fixed, _COPIES, _FULL] = ()
    """embed_tokens and/or lm_head: train a copy of the matrix itself, next to the adapter."""
    use_dora: Annotated[bool, Fixed, _FULL] = False
    """DoRA: train the norm of each output row of an adapted matrix as well as its direction."""
    rank_pattern: Annotated[Names, Fixed, Items("MODULE=RANK", commas=False), _FULL] = ()
    """Ranks of modules (names or regular expressions): `q_proj=8 layers.0.mlp.up_proj=32`."""
    alpha_pattern: Annotated[Names, Fixed, Items("MODULE=ALPHA", commas=False), _FULL] = ()
    """lora_alpha of single modules, in the same form."""
    layers_to_transform: Annotated[Names, Fixed, _LAYERS, _FULL] = ()
    """Numbers of the layers to adapt, from 0; by default all."""
    exclude_modules: Annotated[Names, Fixed, _FULL] = ()
    """Names, suffixes, or one `re:PATTERN`, that are not adapted although the targets name them."""
    lora_embeddings: Annotated[bool, Fixed, _FULL] = False
    """Adapt the embedding too, as embed_tokens among PEFT's targets; a tied head stays as it is."""
    trainable_token_indices: Annotated[Names, Fixed, _TOKENS, _FULL] = ()
    """Token ids whose rows of the embedding (and of a tied head) are trained, the others not."""
    init_lora_weights: Annotated[str, Fixed, _STARTS, _FULL] = "default"
    """Start of A: default (uniform, PEFT's) or gaussian (standard deviation 1 / r), with B zero. Of
    both: pissa (the largest singular values of the weight; slow on large models), pissa_niter_4
    (an approximation of it, and fast) or olora (a QR decomposition). These three subtract the
    start from the frozen weight; the file written is a plain adapter of twice the rank."""
    full_finetuning: Annotated[bool, Fixed] = False
    """Train every weight instead of an adapter."""

    # --- data
    dataset: Annotated[Names, Free, Items(also=Path, commas=False)] = ()
    """Training rows: a .jsonl, .json, .csv or .parquet file, or a hub id. Several are trained
    together: each row once an epoch, or by weights, as `a.jsonl:0.7 b.jsonl:0.3`."""
    dataset_split: Annotated[str, Free] = "train"
    """Split of a hub dataset."""
    dataset_format: Annotated[Format, Free] = "auto"
    """auto (by the columns), text, prompt-completion, messages, sharegpt, alpaca or input_ids."""
    eval_dataset: Annotated[str, Free] = ""
    """Rows to evaluate on, before the first step and after the last; a file or a hub id."""
    dataset_text_field: Annotated[str, Free] = "text"
    """Column that holds the text of plain-text rows."""
    columns: Annotated[Names, Free, Items("NAME=COLUMN")] = ()
    """Column renames, e.g. `prompt=question completion=answer`. Among several datasets, and in the
    evaluation dataset, a column that does not exist is not renamed."""
    chat_template: Annotated[str, Free] = ""
    """Chat template in place of the tokenizer's: a Jinja file, or chatml, llama-3, alpaca or plain.
    It is saved with the result."""
    completion_only_loss: Annotated[bool | None, Free] = None
    """Train on the completion only, or (--no-completion-only-loss) on the prompt too; by default on
    the completion, where rows have a prompt and a completion."""
    assistant_only_loss: Annotated[bool, Free] = False
    """Train on the assistant's turns of a chat only: those that the template's generation blocks
    mark, or, without such blocks, those found by rendering prefixes of the chat."""
    instruction_part: Annotated[str, Free] = ""
    """With --response-part: the text after which, in the rendered row, training stops."""
    response_part: Annotated[str, Free] = ""
    """Train only on what follows this text, up to the next --instruction-part or the end."""
    overlong: Annotated[Literal["truncate", "drop", "split", "error"] | None, Free] = None
    """Rows longer than --max-length: truncate (the default), drop, split or error. By default
    --packing-strategy bfd_split and wrapped split them."""
    skip_bad: Annotated[bool, Free] = False
    """Leave out and count malformed rows instead of stopping at the first."""
    dataset_num_proc: Annotated[int, Free, at_least(1)] = 1
    """Processes that render and tokenise; the result does not depend on it."""
    dataset_cache_dir: Annotated[str, Free] = ""
    """Cache tokenised rows there, for all runs, under a hash of everything they depend on."""
    preview: Annotated[int, Free, at_least(0)] = 0
    """Print the first N rows as the model sees them, trained tokens marked, with their ids."""
    preview_json: Annotated[str, Free] = ""
    """Write the rows of --preview (all rows without it) to this file, for tools."""
    dry_run: Annotated[bool, Free] = False
    """Check everything that can fail before the first step, with a sample of the rows and the
    headers of the weights; report steps, pass and memory; stop. The output directory is not
    touched."""
    packing: Annotated[bool, Fixed] = False
    """Pack several rows into one of max_length tokens, preserving document boundaries."""
    packing_strategy: Annotated[Literal["bfd", "bfd_split", "wrapped"], Fixed, _PACKING] = "bfd"
    """bfd (best-fit decreasing), bfd_split or wrapped."""

    # --- the run
    output_dir: Annotated[str, Free, Check(bool, "a directory for what the run writes")] = "outputs"
    """Where checkpoints, logs and the final adapter go."""
    overwrite_output_dir: Annotated[bool, Free, _RESUME] = False
    """Start over in a directory that already holds a run (its results are removed)."""
    resume_from_checkpoint: Annotated[str, Free] = ""
    """`auto` for the newest complete checkpoint in the output directory, or a checkpoint's path."""
    max_steps: Annotated[int, Free, _SOME] = -1
    """Optimizer steps; -1 means num_train_epochs."""
    num_train_epochs: Annotated[float, Free, above(0), _EPOCHS] = 1.0
    """Passes over the rows."""
    per_device_train_batch_size: Annotated[int, Fixed, at_least(1)] = 2
    """Rows per micro-batch."""
    gradient_accumulation_steps: Annotated[int, Fixed, at_least(1)] = 4
    """Micro-batches per optimizer step. The loss is the token mean over the whole step."""
    optim: Annotated[Optimizer, Fixed] = "adamw"
    """adamw (adamw_torch, adamw_torch_fused), adamw_8bit, paged_adamw_8bit, adafactor, sgd or
    lion_8bit. Trained embeddings, heads, norms and biases keep 32-bit state under every one."""
    learning_rate: Annotated[float, Free, at_least(0)] = 2e-4
    """Peak learning rate."""
    embedding_learning_rate: Annotated[float | None, Free, at_least(0)] = None
    """Peak learning rate of trained embeddings and heads; by default --learning-rate."""
    loraplus_lr_ratio: Annotated[float | None, Free, above(0), _FULL] = None
    """Learning rate of the lora_B matrices over that of the rest (LoRA+)."""
    weight_decay: Annotated[float, Free, at_least(0)] = 0.0
    """Decoupled weight decay; norms and biases are not decayed."""
    warmup_steps: Annotated[float, Free, at_least(0), _CONSTANT] = 0
    """Steps of linear warm-up; below 1, a share of all steps."""
    lr_scheduler_type: Annotated[Schedule, Free] = "linear"
    """linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial, constant,
    constant_with_warmup, inverse_sqrt or warmup_stable_decay."""
    lr_scheduler_kwargs: Annotated[Names, Free, Items("NAME=VALUE")] = ()
    """More of the schedule, e.g. `num_cycles=2` or `min_lr=1e-5`, under transformers' names."""
    loss_type: Annotated[Literal["nll", "dft"], Fixed] = "nll"
    """nll, or dft: each token's loss weighted by its probability (arXiv:2508.05629)."""
    label_smoothing: Annotated[float, Fixed, _SHARE, _DFT] = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    neftune_noise_alpha: Annotated[float, Fixed, at_least(0)] = 0.0
    """Uniform noise of up to alpha / sqrt(tokens of the document * hidden size) on the embeddings
    in training (arXiv:2310.05914)."""
    max_grad_norm: Annotated[float, Free, at_least(0)] = 1.0
    """Clip the global gradient norm to this; 0 measures without clipping."""
    adam_beta1: Annotated[float, Free, _SHARE, _BETAS] = 0.9
    """AdamW beta1."""
    adam_beta2: Annotated[float, Free, _SHARE, _BETAS] = 0.999
    """AdamW beta2."""
    adam_epsilon: Annotated[float, Free, at_least(0), _EPSILON] = 1e-8
    """AdamW epsilon."""
    gradient_checkpointing: Annotated[Checkpointing, Free] = "auto"
    """What each layer saves for the backward pass. auto: the fastest that fits the memory. none:
    save everything, recompute no matmul. full (or block): save the layer's input only. In
    between, from fast to small: recompute_gate_up, recompute_gate_up+qkv, all_but_attention. With
    +offload, it goes to host memory (with none: the residuals and attention's output);
    offload: all of it. At most 60 % of the host's free memory is used for this."""
    step_impl: Annotated[Literal["auto", "explicit", "autograd"], Free] = "auto"
    """Which pass computes gradients: explicit (hand-written backward, captured in CUDA graphs),
    autograd, or auto: explicit on a GPU wherever it supports the run."""
    attn_implementation: Annotated[AttentionImpl, Free] = "auto"
    """Attention over rows of several documents on a GPU. auto: the flash attention inside torch.
    flash_attention_3, flash_attention_4: that package, if you have installed it. Rows of one
    document each go through cuDNN."""
    max_memory_gib: Annotated[float, Free, at_least(0)] = 0.0
    """GPU memory that auto may plan with; 0 is all that is free."""
    micro_batch_tokens: Annotated[int, Free, at_least(0)] = 0
    """Tokens that the explicit pass computes at a time; 0 chooses. Loss and gradient do not depend
    on it: they are those of the token mean over the step."""
    stop_on_loss_spike: Annotated[bool, Free] = False
    """Stop (exit code 3) after five steps in a row whose loss is more than twice the mean of the
    last 100 and 1 above it; a spike always gives a warning."""
    deterministic: Annotated[bool, Free] = False
    """Use only algorithms that give the same bits in every process (on a GPU: slower)."""
    seed: Annotated[int, Fixed, _SEED] = 3407
    """Seed of row order, adapter initialisation and dropout."""
    logging_steps: Annotated[int, Free, at_least(1)] = 1
    """Write a metrics line every N steps (the mean over them)."""
    report_to: Annotated[Names, Free, _LOGGERS] = ()
    """tensorboard, wandb and/or trackio, besides metrics.jsonl, which is always written."""
    run_name: Annotated[str, Free, _LOGGER] = ""
    """Name of the run in these loggers; by default that of the output directory."""
    logging_dir: Annotated[str, Free, _LOGGER, _TRACKIO] = ""
    """Where these loggers write; by default the output directory. Not for trackio: $TRACKIO_DIR."""
    save_strategy: Annotated[SaveStrategy, Free] = "steps"
    """`steps` writes a checkpoint every save_steps, `epoch` after each pass over the rows, `best`
    where an evaluation is the best so far, each also at the end; `no` only when stopped."""
    save_steps: Annotated[int, Free, at_least(1), _SAVE_STEPS] = 500
    """Steps between checkpoints under --save-strategy steps."""
    save_total_limit: Annotated[int, Free, at_least(0), _UNSAVED] = 0
    """Keep at most N checkpoints, the newest and the best always among them; 0 keeps all."""
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], Free] = "no"
    """With --eval-dataset: `no` evaluates before the first step and after the last; `steps` also
    every eval_steps, `epoch` also after each pass over the rows."""
    eval_steps: Annotated[int, Free, at_least(0), _EVAL_STEPS] = 0
    """Steps between evaluations under --eval-strategy steps; 0 means logging_steps."""
    per_device_eval_batch_size: Annotated[int, Free, at_least(0), _ROWS] = 0
    """Rows per evaluation batch; 0 means per_device_train_batch_size. The loss is the mean over
    tokens and does not depend on it."""
    eval_generate: Annotated[int, Free, at_least(0)] = 0
    """Answer the first N eval prompts greedily at every evaluation: samples.jsonl; count exact
    matches and ends of turn."""
    save_merged: Annotated[bool, Free, _FULL] = False
    """Also write the adapter merged into its base (as scripts/merge.py does) to merged/."""
    load_best_model_at_end: Annotated[bool, Free] = False
    """Export the weights of the best evaluation, not the last; each best one gets a checkpoint."""
    metric_for_best_model: Annotated[BestMetric, Free, _BEST] = "loss"
    """Metric that decides the best evaluation: (eval_)loss, mean_token_accuracy or entropy."""
    greater_is_better: Annotated[bool | None, Free, _BEST] = None
    """Whether a greater metric is better; by default it is unless the metric is the loss."""
    early_stopping_patience: Annotated[int, Free, at_least(0)] = 0
    """Stop once N evaluations in a row were no better than the best; 0 never does."""
    early_stopping_threshold: Annotated[float, Free, at_least(0), _PATIENCE] = 0.0
    """By how much an evaluation must be better than the best to reset the patience."""

    def __post_init__(self):
        declared = fields.settings(type(self))
        new = {name: s.normalized(getattr(self, name)) for name, s in declared.items()}
        # As in Trainer, report_to="none" means no logger.
        new["report_to"] = tuple(name for name in new["report_to"] if name != "none")
        if new["full_finetuning"]:
            new["load_in_4bit"] = False
        for name, value in new.items():
            object.__setattr__(self, name, value)
        for name, setting in declared.items():
            setting.check(new[name])
        # Report given settings that have no effect, instead of ignoring them.
        for name, why, remedy in fields.idle_settings(self):
            if remedy:
                given = fields.as_flag(name, new[name])
                raise UserError(f"{given} has no effect with {why}; {remedy}")
        self._check_evaluation()
        # Evaluate these properties now, so that malformed values fail before the model is loaded.
        _ = self.lora, self.column_map, self.scheduler_options
        read = [Path(name).resolve() for name in (*dict(self.sources), self.eval_dataset)]
        written = self.preview_json
        if written and Path(written).resolve() in read:
            raise UserError(
                f"--preview-json {written} is a file of rows that is read; name another"
            )

    def _check_evaluation(self) -> None:
        """Raise UserError if a setting needs eval rows, evaluations or checkpoints that are off."""
        strategy, best = self.eval_strategy, self.load_best_model_at_end
        chooses_best = {
            "--load-best-model-at-end": best,
            "--early-stopping-patience": self.early_stopping_patience,
            "--save-strategy best": self.save_strategy == "best",
        }
        if strategy != "no" and not self.eval_dataset:
            raise UserError(f"--eval-strategy {strategy} needs --eval-dataset; give one")
        for name, given in chooses_best.items():
            if given and strategy == "no":
                raise UserError(f"{name} needs --eval-strategy steps or epoch; give one")
        if best and self.save_strategy == "no":
            missing = "needs checkpoints, but --save-strategy is no; use best"
            raise UserError(f"--load-best-model-at-end {missing}")
        if self.eval_generate and not self.eval_dataset:
            raise UserError("--eval-generate takes its prompts from --eval-dataset; give one")

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter's settings, or None with --full-finetuning."""
        if self.full_finetuning:
            return None
        # Except for r, the fields of LoraConfig have the same names in TrainConfig.
        names = {field.name: field.name for field in dataclasses.fields(LoraConfig)}
        names["r"] = "lora_r"
        given: dict[str, Any] = {theirs: getattr(self, ours) for theirs, ours in names.items()}
        for name in ("rank_pattern", "alpha_pattern"):
            given[name] = _pattern(name, given[name])
        for name, items in (("layers_to_transform", _LAYERS), ("trainable_token_indices", _TOKENS)):
            given[name] = _whole_numbers(name, given[name], items.what)
        return LoraConfig(**given)

    @property
    def sources(self) -> list[tuple[str, float | None]]:
        """The training datasets and their weights: [("a.jsonl", 0.7), ("b.jsonl", 0.3)].

        Weights are scaled to sum to 1. Without weights on the command line they are None.
        """
        found: list[tuple[str, float | None]] = []
        for item in self.dataset:
            name, _, text = item.rpartition(":")
            weight = _number(text)
            # An existing file whose name ends in a colon and a number has no weight.
            if not name or weight is None or Path(item).exists():
                found.append((item, None))
            elif 0 < weight < math.inf:
                found.append((name, weight))
            else:
                raise wrong("--dataset", item, "a weight above 0")
        given = [weight for _, weight in found if weight is not None]
        if given and len(given) != len(found):
            shown = " ".join(self.dataset)
            raise UserError(f"--dataset is {shown}; give every dataset a weight, or none")
        total = sum(given)
        return [(name, None if weight is None else weight / total) for name, weight in found]

    @property
    def base_name(self) -> str:
        """The base model's name in adapter_config.json: hub id, or absolute path of a directory."""
        path = Path(self.model).expanduser()
        return str(path.resolve()) if path.is_dir() else self.model

    @property
    def serves_in_4bit(self) -> bool:
        """Whether the finished adapter is meant for the 4-bit base that it was trained with.

        False for PiSSA and OLoRA, which subtract the initial adapter from the base for training.
        """
        return self.load_in_4bit and not (self.lora and self.lora.splits_weights)

    @property
    def keeps_best(self) -> bool:
        """Whether the run depends on which evaluation is the best."""
        by_name = self.load_best_model_at_end or self.early_stopping_patience
        return bool(by_name or self.save_strategy == "best")

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric that decides the best evaluation, and whether greater is better."""
        name, greater = self.metric_for_best_model.removeprefix("eval_"), self.greater_is_better
        return f"eval_{name}", name != "loss" if greater is None else greater

    @property
    def column_map(self) -> dict[str, str]:
        """The column renames: `--columns prompt=question` gives {"prompt": "question"}."""
        pairs = [item.split("=", 1) for item in self.columns]
        for item, pair in zip(self.columns, pairs, strict=True):
            if len(pair) != 2 or not all(pair):
                raise wrong("--columns", item, "NAME=COLUMN, such as prompt=question")
        if len({ours for ours, _ in pairs}) < len(pairs):
            raise wrong("--columns", " ".join(self.columns), "each NAME once")
        return {ours: theirs for ours, theirs in pairs if ours != theirs}

    @property
    def scheduler_options(self) -> dict[str, Any]:
        """The checked options of the schedule: `num_cycles=2` gives {"num_cycles": 2.0}."""
        kind, rate = self.lr_scheduler_type, self.learning_rate
        given = dict(_scheduler_option(kind, item) for item in self.lr_scheduler_kwargs)
        needs = f"--lr-scheduler-type {kind} needs --lr-scheduler-kwargs"
        if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
            raise UserError(f"{needs} num_decay_steps=N")
        if kind == "cosine_with_min_lr" and ("min_lr" in given) == ("min_lr_rate" in given):
            raise UserError(f"{needs} min_lr=RATE or min_lr_rate=SHARE, and not both")
        # In transformers, lr_end is 1e-7 by default.
        ends = {"lr_end": 1e-7} | given if kind == "polynomial" else given
        for name in ("min_lr", "lr_end"):
            if name in ends and not rate > ends[name]:
                end = f"--lr-scheduler-kwargs {name}={ends[name]:g}"
                raise UserError(f"{end} is not below --learning-rate {rate:g}")
        return given


def _pattern(name: str, items: Names) -> tuple[tuple[str, float], ...]:
    """Parse rank_pattern or alpha_pattern: `q_proj=8` -> (("q_proj", 8),); ranks are int."""
    pairs, whole = [], name == "rank_pattern"
    for item in items:
        key, _, text = item.rpartition("=")
        value = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
        if not key or value <= 0 or (whole and value != int(value)):
            raise wrong(flag(name), item, f"MODULE=a {'whole ' * whole}number above 0")
        matches(key, "")  # raises for a malformed regular expression
        pairs.append((key, int(value) if whole else value))
    return tuple(pairs)


def _whole_numbers(name: str, items: Names, what: str) -> tuple[int, ...]:
    for item in items:
        if not item.isdecimal():
            raise wrong(flag(name), item, f"{what}, from 0")
    numbers = tuple(map(int, items))
    if len(set(numbers)) != len(numbers):
        raise wrong(flag(name), " ".join(items), "each once")
    return numbers


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _scheduler_option(kind: str, item: str) -> tuple[str, Any]:
    """Parse and check one schedule option: `num_cycles=2` -> ("num_cycles", 2.0)."""
    name, _, text = item.partition("=")
    known, number = _SCHEDULE_OPTIONS.get(kind, ()), _number(text)
    if name not in known:
        names = f"--lr-scheduler-type {kind} knows these names: {', '.join(known) or 'none'}"
        raise wrong("--lr-scheduler-kwargs", item, f"NAME=VALUE, and {names}")
    if name.endswith("_type"):
        if text not in _WAVES:
            raise wrong("--lr-scheduler-kwargs", item, f"one of {', '.join(_WAVES)}")
        return name, text
    if number is None or not 0 <= number < math.inf:
        raise wrong("--lr-scheduler-kwargs", item, "a number, 0 or more")
    return name, number
