"""Benchmark one training step, all rows of the README's table, or one kernel against its peers:

python scripts/bench.py step --shape 1b --max-memory-gib 5.45
python scripts/bench.py table
python scripts/bench.py kernel swiglu
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from minisft.kernels.nf4 import NF4Weight, quantize
from random_model import config_json
from torch import Tensor

from minisft.batches import Ahead, Batches, RowSchedule, TokenizedDataset
from minisft.config.errors import UserError
from minisft.config.flags import parse_flags, run_main
from minisft.config.hf import parse_model_config
from minisft.config.model import ModelConfig
from minisft.config.targets import split_targets
from minisft.config.train import TrainConfig
from minisft.data.packing import GROUP_ROWS, write_packed
from minisft.data.token_files import TokenWriter
from minisft.explicit import Choice, choose
from minisft.files.device import resolve_device, resolve_dtype
from minisft.files.load import Base
from minisft.llama import Compute
from minisft.lora import allocate, init_lora_, param_groups, trainable_shapes
from minisft.optim import init_moments
from minisft.step import ExecutionPlan, State, train_step_

PEAK = 790e12  # FLOP/s of dense bf16 matmuls on an H200
BANDWIDTH = 4.3e12  # bytes per second of a copy on an H200
WARM_UP = 3  # first steps, not measured: compilation, graph capture, pinning of host memory
MAX_CPU_SECONDS = 300  # a CPU benchmark that would take longer is refused


@dataclass(frozen=True)
class StepConfig:
    """Benchmark a training step of a published shape, with random weights and random tokens."""

    shape: str = "1b"
    """Model shape: tiny, 1b, 3b, 8b or 70b."""
    layers: int = 0
    """Number of layers. 0: as many as the shape has."""
    vocab_size: int = 128256
    """Vocabulary size: rows of the embedding."""
    batch_size: int = 2
    """Rows per micro-batch, like --per-device-train-batch-size."""
    accumulation: int = 4
    """Micro-batches per step, like --gradient-accumulation-steps."""
    length: int = 2048
    """Maximum tokens per row."""
    rows: str = "full"
    """full: every row has `length` tokens. short: log-normal row lengths with median 120."""
    packing: bool = False
    """Pack short rows into rows of up to `length` tokens."""
    load_in_4bit: bool = True
    """Store the linear weights in NF4 with double quantisation; otherwise in the compute dtype."""
    lora_r: int = 16
    """LoRA rank, on all seven linear layers."""
    dtype: str = "auto"
    """Compute dtype."""
    device: str = "auto"
    """Device: auto, cpu or cuda."""
    optim: str = "adamw"
    """Optimizer, like --optim of train.py."""
    step_impl: str = "auto"
    """Implementation of the pass: explicit, autograd or auto."""
    gradient_checkpointing: str = "auto"
    """Memory policy, like --gradient-checkpointing of train.py."""
    max_memory_gib: float = 0.0
    """GPU memory that the plan may use. 0: all that is free."""
    micro_batch_tokens: int = 0
    """Tokens per micro-batch. 0: chosen by the planner."""
    steps: int = 12
    """Steps to measure after three warm-up steps; the median is reported."""
    profile: bool = False
    """Profile one extra step and print its GPU kernels by time."""
    seed: int = 0
    """Random seed of weights and tokens."""


@dataclass(frozen=True)
class KernelConfig:
    """Benchmark one op of kernels/ against PyTorch, torch.compile and, if installed, Liger."""

    device: str = "auto"
    """Device: auto, cpu or cuda."""
    skip_test: bool = False
    """Do not run the op's test before the benchmark."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, run the benchmark, and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def run() -> None:
        what = argv[0] if argv else ""
        if what == "step":
            prog = "bench.py step"
            step(parse_flags(StepConfig, argv[1:], prog=prog, default=StepConfig()))
        elif what == "table" and len(argv) == 1:
            table()
        elif what == "kernel" and len(argv) > 1:
            from bench_kernels import measure

            prog = "bench.py kernel NAME"
            config = parse_flags(KernelConfig, argv[2:], prog=prog, default=KernelConfig())
            measure(argv[1], resolve_device(config.device), config.skip_test)
        else:
            raise UserError(
                f"bench.py: {' '.join(argv) or 'nothing'!r} is not a benchmark; expected "
                "`step [flags]`, `table` or `kernel NAME [flags]`"
            )

    return run_main(run, {})


# ---------------------------------------------------------------------------------- training step


def step(config: StepConfig) -> dict:
    """Measure a training step, print a table to stderr and one JSON line, and return its content.

    Raises UserError for settings that cannot be measured on this device.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    cfg = parse_model_config(config_json(config.shape, config.vocab_size, config.layers))
    announce(config, cfg, device)
    settings = train_config(config)
    base, state = random_model(config, settings, cfg, device, dtype)
    data = random_rows(config)
    longest = int(data.document_offsets[data.row_offsets].diff().max())
    choice = choose(settings, state.trainable, base.frozen, base.compute, longest)
    print(choice.description, file=sys.stderr)
    batches = Batches(
        data,
        RowSchedule(len(data), config.batch_size, config.accumulation, seed=config.seed),
        max_tokens=choice.tokens,
        # The hand-written pass pads batches on the CPU and copies them into CUDA graph inputs.
        device=torch.device("cpu") if choice.explicit else device,
        ahead=device.type == "cuda",
    )
    plan = ExecutionPlan(base.compute, choice).prepared(state.trainable, base.frozen)
    seconds, tokens = timed_steps(config, settings, base, state, batches, plan)
    result = summary(config, choice, seconds, tokens, device)
    if device.type == "cuda":
        bounds = floors(cfg, config.lora_r, longest, choice.tokens)
        result |= gpu_summary(plan, *median_step(seconds, tokens), bounds, device)
    for name, value in result.items():
        print(f"  {name:18} {value}", file=sys.stderr)
    print(json.dumps(result))
    return result


def train_config(config: StepConfig) -> TrainConfig:
    """Return the settings of a training run whose steps are measured."""
    return TrainConfig(
        model="random",
        dataset=("random",),
        lora_r=config.lora_r,
        max_length=config.length,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        load_in_4bit=config.load_in_4bit,
        optim=config.optim,
        step_impl=config.step_impl,
        gradient_checkpointing=config.gradient_checkpointing,
        max_memory_gib=config.max_memory_gib,
        micro_batch_tokens=config.micro_batch_tokens,
        learning_rate=1e-5,
    )


def timed_steps(
    config: StepConfig,
    settings: TrainConfig,
    base: Base,
    state: State,
    batches: Batches,
    plan: ExecutionPlan,
) -> tuple[list[float], list[int]]:
    """Run all steps; return the seconds and the tokens of each step, including warm-up steps."""
    seconds, tokens = [], []
    groups = param_groups(state.trainable.shapes, settings)
    last = config.steps + WARM_UP - 1
    ahead = Ahead(batches, 0, last + 1)
    for i in range(last + 1):
        started = time.perf_counter()
        batch = ahead.batch(i)
        # The profiler slows down the last step, so it is not timed.
        if config.profile and i == last:
            profiled(lambda b=batch: train_step_(state, base.frozen, b, plan, groups, settings, 1))
            continue
        train_step_(state, base.frozen, batch, plan, groups, settings, 1.0)
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(batch.num_tokens)
    return seconds, tokens


def median_step(seconds: list[float], tokens: list[int]) -> tuple[float, int]:
    """Return (seconds, tokens) of the measured step with the median time per token."""
    measured = zip(seconds[WARM_UP:], tokens[WARM_UP:], strict=True)
    by_rate = sorted(measured, key=lambda m: m[0] / m[1])
    return by_rate[len(by_rate) // 2]


def summary(
    config: StepConfig,
    choice: Choice,
    seconds: list[float],
    tokens: list[int],
    device: torch.device,
) -> dict:
    """Return name -> value of the results that are measured on every device, CPU or GPU."""
    took, count = median_step(seconds, tokens)
    fastest, slowest = min(seconds[WARM_UP:]), max(seconds[WARM_UP:])
    return {
        "shape": config.shape,
        "batch": f"{config.batch_size}x{config.accumulation}",
        "rows": config.rows,
        "packing": config.packing,
        "length": config.length,
        "pass": choice.description.split(";")[0],
        "tokens_per_second": round(count / took),
        "step_ms": round(1e3 * took, 1),
        "spread_ms": [round(1e3 * fastest, 1), round(1e3 * slowest, 1)],
        "tokens_per_step": round(statistics.mean(tokens[WARM_UP:])),
        "first_step_s": round(seconds[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def gpu_summary(
    plan: ExecutionPlan,
    took: float,
    count: int,
    bounds: tuple[float, float],
    device: torch.device,
) -> dict:
    """Return GPU memory figures, both bounds in tokens/s, and the share of each that is reached.

    took, count: seconds and tokens of the median step. bounds: the result of `floors`.
    """
    assert plan.choice is not None
    floor, roofline = bounds
    host = plan.explicit.host.buffers.values() if plan.explicit else ()
    return {
        "compute_floor": round(1 / floor),
        "serial_roofline": round(1 / roofline),
        "of_floor": round(floor * count / took, 3),
        "of_roofline": round(roofline * count / took, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3),
        "predicted_gib": round(plan.choice.peak_bytes / 2**30, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2),
        "pinned_gib": round(sum(b.nbytes for b in host) / 2**30, 2),
    }


def announce(config: StepConfig, cfg: ModelConfig, device: torch.device) -> None:
    """Print what will be measured and, on a CPU, the estimated seconds.

    Raises UserError if the estimate exceeds MAX_CPU_SECONDS.
    """
    count = config.batch_size * config.accumulation * config.length * (config.steps + WARM_UP)
    line = (
        f"{config.shape} on {device}: {cfg.num_hidden_layers} layers, vocabulary {cfg.vocab_size}; "
        f"{config.steps + WARM_UP} steps of {config.batch_size} x {config.accumulation} rows of up "
        f"to {config.length} tokens"
    )
    if device.type == "cpu":
        matrix = torch.ones(1024, 1024)
        started = time.perf_counter()
        matrix @ matrix
        rate = 2 * 1024**3 / (time.perf_counter() - started)
        arithmetic, _ = floors(cfg, config.lora_r, config.length, config.length)
        # A step on a CPU runs at about half the rate of a plain matmul.
        seconds = 2 * count * arithmetic * PEAK / rate
        line += f", about {seconds:,.0f} s"
        if seconds > MAX_CPU_SECONDS:
            raise UserError(
                f"{line}: too long; use a GPU or a smaller benchmark, such as --shape tiny "
                "--vocab-size 8192 --length 256 --steps 3"
            )
    print(line, file=sys.stderr, flush=True)


# Flags of `bench.py step` for each row of the README's table, including the memory limit.
ROWS = (
    "--shape 8b --max-memory-gib 6.78 --optim adamw_8bit --steps 6",
    "--shape 8b --max-memory-gib 20.9 --steps 6",
    "--shape 8b --max-memory-gib 11.65 --batch-size 1 --accumulation 1 --length 32768 --steps 3",
    "--shape 1b --max-memory-gib 1.61 --optim adamw_8bit",
    "--shape 1b --max-memory-gib 5.45",
    "--shape 1b --max-memory-gib 17.8 --batch-size 8 --accumulation 1",
    "--shape 1b --max-memory-gib 1.65 --optim adamw_8bit --rows short --packing --steps 30",
    "--shape 1b --max-memory-gib 3.04 --rows short --steps 60",
)


def table() -> None:
    """Run every row of ROWS and print the results as a Markdown table.

    Raises UserError after the table if a row failed.
    """
    print("| work | tok/s | peak GiB | predicted | pinned | first step s | of roofline | pass |")
    print("|---" * 8 + "|")
    names = (
        "tokens_per_second", "peak_gib", "predicted_gib", "pinned_gib", "first_step_s",
        "of_roofline", "pass",
    )  # fmt: skip
    failed = 0
    for row in ROWS:
        # Use a process per row: peak and free memory must not depend on the previous rows.
        command = [sys.executable, __file__, "step", *row.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failed += 1
            print(f"| `{row}` | {done.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        shown = " | ".join(str(found.get(name, "")) for name in names)
        print(f"| `{row}` | {shown} |", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(ROWS)} rows failed; the table shows each error")


def random_model(
    config: StepConfig,
    settings: TrainConfig,
    cfg: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Base, State]:
    """Return what load_base returns for a model, with random weights drawn on the device."""
    generator = torch.Generator(device).manual_seed(config.seed)
    frozen: dict[str, Tensor | NF4Weight] = {}
    for name, shape in cfg.weight_shapes().items():
        if name.endswith("norm.weight"):
            frozen[name] = torch.ones(shape, dtype=dtype, device=device)
            continue
        weight = torch.empty(shape, dtype=dtype, device=device)
        weight.normal_(0, 0.02, generator=generator)
        four_bit = config.load_in_4bit and name.endswith("_proj.weight")
        frozen[name] = quantize(weight) if four_bit else weight
        # Free the 16-bit matrix before allocating the next one.
        del weight
    lora = settings.lora and split_targets(settings.lora)
    assert lora is not None
    shapes = trainable_shapes(lora, cfg)
    flat = allocate(shapes, device)
    init_lora_(flat, config.seed)
    # Draw B at random: with the usual B = 0, the gradient of A would be zero.
    for name, view in flat.views.items():
        if name.endswith("lora_B.weight"):
            view.normal_(0, 0.01, generator=generator)
    compute = Compute(
        cfg, dtype, lora_scaling=lora.scaling,
        checkpoint_blocks=config.gradient_checkpointing in ("block", "full"),
    )  # fmt: skip
    state = State(flat, init_moments(flat, param_groups(shapes, settings), config.optim))
    return Base(None, frozen, compute, device, lora), state  # pyright: ignore


def random_rows(config: StepConfig) -> TokenizedDataset:
    """Return rows of random tokens for all steps: full, or of log-normal lengths (packed if set).

    Raises UserError if config.rows is neither full nor short.
    """
    generator = torch.Generator().manual_seed(config.seed)
    count = config.batch_size * config.accumulation * (config.steps + WARM_UP)
    if config.rows == "full":
        lengths = torch.full((count,), config.length)
    elif config.rows == "short":
        # Rows have about 160 tokens on average: generate as many as the packed rows hold.
        count *= max(1, config.length // 160) if config.packing else 1
        draws = torch.randn(count, generator=generator)
        lengths = (120 * torch.exp(0.8 * draws)).long().clamp(8, config.length)
    else:
        raise UserError(f"--rows is {config.rows!r}; expected full or short")
    ids = torch.randint(
        config.vocab_size, (int(lengths.sum()),), generator=generator, dtype=torch.int32
    )
    writer = TokenWriter()
    documents = [(d, d) for d in map(Tensor.numpy, ids.split(lengths.tolist()))]
    strategy = "bfd" if config.packing else None
    for begin in range(0, count, GROUP_ROWS):
        write_packed(writer, documents[begin : begin + GROUP_ROWS], config.length, strategy)
    return writer.finish({})


def floors(cfg: ModelConfig, rank: int, length: int, tokens: int) -> tuple[float, float]:
    """Return lower bounds in seconds per token: (FLOPs alone, FLOPs plus memory traffic).

    rank: LoRA rank. length: tokens per row. tokens: tokens per micro-batch, which share the cost of
    decoding the weights. Assumes PEAK and BANDWIDTH, no recomputation and no overlap.
    """
    D, F, V, L = cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size, cfg.num_hidden_layers
    q, kv = (heads * cfg.head_dim for heads in (cfg.num_attention_heads, cfg.num_key_value_heads))
    linears = [(D, q), (D, kv), (D, kv), (q, D), (D, F), (D, F), (F, D)]
    weights = L * sum(i * o for i, o in linears)
    features = L * sum(i + o for i, o in linears)
    arithmetic = 4 * weights - 2 * D * (q + 2 * kv) + 6 * rank * features
    arithmetic += 7 * q * length * L + 4 * D * V
    moved = L * (36 * D + 8 * (q + kv) + 18 * F) + 6 * V
    moved += L * (4 * (2 * D + q + F) + 2 * sum(o for _, o in linears))
    moved += 2 * (0.5 + 1 / 64 + 2) * weights / tokens
    return arithmetic / PEAK, arithmetic / PEAK + moved / BANDWIDTH


def profiled(run) -> None:
    """Profile a call of `run` and print its GPU kernels, sorted by total time, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    # Leave out aten:: events, which repeat the time of the kernels that they launch.
    events = [e for e in events if not e.key.startswith("aten::")]
    total = sum(e.self_device_time_total for e in events)
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:40]:
        share = event.self_device_time_total / total
        print(
            f"  {event.self_device_time_total:9.0f} us {share:6.1%} x{event.count:<5} "
            f"{event.key[:80]}",
            file=sys.stderr,
        )
    print(f"  {total:9.0f} us in kernels", file=sys.stderr)
    assert math.isfinite(total)


if __name__ == "__main__":
    sys.exit(main())
