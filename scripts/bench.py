"""Measure a training step, the README's table of them, or one kernel against what else there is:

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
from minisft.explicit.plan import choose
from minisft.files.device import resolve_device, resolve_dtype
from minisft.files.load import Base
from minisft.llama import Compute
from minisft.lora import allocate, init_lora_, param_groups, trainable_shapes
from minisft.optim import init_moments
from minisft.step import ExecutionPlan, State, train_step_

PEAK = 790e12  # floating-point operations a second of an H200's dense bf16 products
MAX_CPU_SECONDS = 300  # of a step's measurement


@dataclass(frozen=True)
class StepConfig:
    """One training step of a published shape, with random weights and random tokens."""

    shape: str = "1b"
    """tiny, 1b, 3b, 8b or 70b."""
    layers: int = 0
    """Fewer layers than the shape has; 0 keeps the shape's."""
    vocab_size: int = 128256
    """Rows of the embedding."""
    batch_size: int = 2
    """Rows per micro-batch, as --per-device-train-batch-size."""
    accumulation: int = 4
    """Micro-batches per step, as --gradient-accumulation-steps."""
    length: int = 2048
    """Tokens of a row."""
    rows: str = "full"
    """full: rows of `length` random tokens. short: log-normal lengths with median 120."""
    packing: bool = False
    """Pack short rows into rows of `length`."""
    load_in_4bit: bool = True
    """NF4 weights with double quantisation; else 16-bit."""
    lora_r: int = 16
    """LoRA rank, on all seven linears."""
    dtype: str = "auto"
    """Compute dtype."""
    device: str = "auto"
    """auto, cpu or cuda."""
    optim: str = "adamw"
    """Optimizer."""
    step_impl: str = "auto"
    """explicit, autograd or auto."""
    gradient_checkpointing: str = "auto"
    """Memory policy."""
    max_memory_gib: float = 0.0
    """GPU memory to plan with; 0 is all that is free."""
    micro_batch_tokens: int = 0
    """Tokens at a time; 0 chooses."""
    steps: int = 12
    """Steps to measure, after three of warm-up; the median is reported."""
    profile: bool = False
    """Print where one step's time goes, kernel by kernel."""
    seed: int = 0
    """Of weights and tokens."""


@dataclass(frozen=True)
class KernelConfig:
    """One op of kernels/ against PyTorch, torch.compile and (where installed) Liger."""

    device: str = "auto"
    """auto, cpu or cuda."""
    skip_test: bool = False
    """Measure without running the op's test first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, measure, and return the exit code."""
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
                f"bench.py: {' '.join(argv) or 'nothing'!r} is no benchmark; expected "
                "`step [flags]`, `table` or `kernel NAME [flags]`"
            )

    return run_main(run, {})


# ------------------------------------------------------------------------------------- the step


def step(config: StepConfig) -> dict:
    """Measure, and print a table and one JSON line; returns what the line holds."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    cfg = parse_model_config(config_json(config.shape, config.vocab_size, config.layers))
    announce(config, cfg, device)
    settings = TrainConfig(
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
    model, state = random_model(config, settings, cfg, device, dtype)
    data = random_rows(config)
    longest = int(data.document_offsets[data.row_offsets].diff().max())
    rows = config.batch_size * config.accumulation
    choice = choose(settings, state.trainable, model.frozen, model.compute, longest, rows * longest)
    print(choice.said, file=sys.stderr)
    batches = Batches(
        data,
        RowSchedule(len(data), config.batch_size, config.accumulation, seed=config.seed),
        max_tokens=choice.tokens,
        device=torch.device("cpu") if choice.explicit else device,
        ahead=device.type == "cuda",
    )
    seconds, tokens = [], []
    plan = ExecutionPlan(model.compute, choice).prepared(state.trainable, model.frozen)
    slices = param_groups(state.trainable.shapes, settings)
    ahead = Ahead(batches, 0, config.steps + 3)
    for i in range(config.steps + 3):
        started = time.perf_counter()
        batch = ahead.batch(i)
        if config.profile and i == config.steps + 2:
            profiled(lambda b=batch: train_step_(state, model.frozen, b, plan, slices, settings, 1))
            continue
        train_step_(state, model.frozen, batch, plan, slices, settings, 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(batch.num_tokens)
    measured = sorted(zip(seconds[3:], tokens[3:], strict=True), key=lambda m: m[0] / m[1])
    took, count = measured[len(measured) // 2]
    floor, roofline = floors(cfg, config.lora_r, longest, choice.tokens, device)
    result = {
        "shape": config.shape, "batch": f"{config.batch_size}x{config.accumulation}",
        "rows": config.rows, "packing": config.packing, "length": config.length,
        "pass": choice.said.split(";")[0], "tokens_per_second": round(count / took),
        "step_ms": round(1e3 * took, 1), "spread_ms": [
            round(1e3 * s, 1) for s in (min(seconds[3:]), max(seconds[3:]))
        ],
        "tokens_per_step": round(statistics.mean(tokens[3:])), "first_step_s": round(seconds[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }  # fmt: skip
    if device.type == "cuda":
        host = plan.fast.host.buffers.values() if plan.fast else ()
        result |= {
            "compute_floor": round(1 / floor),
            "serial_roofline": round(1 / roofline),
            "of_floor": round(floor * count / took, 3),
            "of_roofline": round(roofline * count / took, 3),
            "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3),
            "predicted_gib": round(choice.peak_bytes / 2**30, 3),
            "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2),
            "pinned_gib": round(sum(b.nbytes for b in host) / 2**30, 2),
        }
    for name, value in result.items():
        print(f"  {name:18} {value}", file=sys.stderr)
    print(json.dumps(result))
    return result


def announce(config: StepConfig, cfg: ModelConfig, device: torch.device) -> None:
    """Say what will be measured; on a CPU how long it takes, and UserError where that is too long.

    A step there runs at about half the rate of a matrix product.
    """
    count = config.batch_size * config.accumulation * config.length * (config.steps + 3)
    line = (
        f"{config.shape} on {device}: {cfg.num_hidden_layers} layers, vocabulary {cfg.vocab_size}; "
        f"{config.steps + 3} steps of {config.batch_size} x {config.accumulation} rows of up to "
        f"{config.length} tokens"
    )
    if device.type == "cpu":
        matrix = torch.ones(1024, 1024)
        started = time.perf_counter()
        matrix @ matrix
        rate = 2 * 1024**3 / (time.perf_counter() - started)
        arithmetic, _ = floors(cfg, config.lora_r, config.length, config.length, device)
        seconds = 2 * count * arithmetic * PEAK / rate
        line += f", about {seconds:,.0f} s"
        if seconds > MAX_CPU_SECONDS:
            raise UserError(
                f"{line}: too long; use a GPU, or less, such as --shape tiny --vocab-size 8192 "
                "--length 256 --steps 3"
            )
    print(line, file=sys.stderr, flush=True)


# The README's rows: the work, and the memory it may take.
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
    """Every row in a process of its own, so that each has the memory to itself.

    Raises UserError behind the table if a row could not be measured.
    """
    print("| work | tok/s | peak GiB | predicted | pinned | first step s | of roofline | pass |")
    print("|---" * 8 + "|")
    names = (
        "tokens_per_second", "peak_gib", "predicted_gib", "pinned_gib", "first_step_s",
        "of_roofline", "pass",
    )  # fmt: skip
    failed = 0
    for row in ROWS:
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
        raise UserError(f"{failed} of {len(ROWS)} rows could not be measured; the table says why")


def random_model(
    config: StepConfig,
    settings: TrainConfig,
    cfg: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Base, State]:
    """A model as load_base returns it, drawn on the device."""
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
        del weight
    lora = settings.lora and split_targets(settings.lora)
    assert lora is not None
    shapes = trainable_shapes(lora, cfg)
    flat = allocate(shapes, device)
    init_lora_(flat, config.seed)
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
    """Rows for the steps: full ones, or log-normal lengths with median 120, packed on request."""
    generator = torch.Generator().manual_seed(config.seed)
    count = config.batch_size * config.accumulation * (config.steps + 3)
    if config.rows == "full":
        lengths = torch.full((count,), config.length)
    elif config.rows == "short":
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


def floors(
    cfg: ModelConfig, rank: int, length: int, tokens: int, device: torch.device
) -> tuple[float, float]:
    """Seconds a token: arithmetic alone, and arithmetic plus the bytes that must move.

    790 TFLOP/s and 4.3 TB/s, an H200's dense bf16 rate and copy bandwidth, nothing recomputed.
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
    return arithmetic / PEAK, arithmetic / PEAK + moved / 4.3e12


def profiled(run) -> None:
    """Prints the device's kernels by time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
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
