"""Time each op of kernels/ against eager PyTorch, torch.compile and Liger, at 1B and 8B shapes.

Run as `python scripts/bench.py kernel NAME`. An op whose test fails is not timed.
"""

import functools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.config.errors import UserError

ROOT = Path(__file__).parents[1]
T = 4096  # tokens
SHAPES = {"1b": (2048, 8192, 32, 8, 64), "8b": (4096, 14336, 32, 8, 128)}  # D, F, N, K, H
Runs = dict[str, Callable[[], object]]


def measure(name: str, device: torch.device, skip_test: bool) -> None:
    """Run the test of the op called `name`, then time the op and print a Markdown table.

    Raises UserError for an unknown op, a device without CUDA, or a failing test.
    """
    benches = {
        "adamw": adamw,
        "linear_cross_entropy": cross_entropy,
        "low_rank": low_rank,
        "nf4": nf4,
        "nf4_lora_linear": nf4_lora_linear,
        "rms_norm": rms_norm,
        "rope": rope,
        "swiglu": swiglu,
    }
    if name not in benches:
        raise UserError(f"bench.py kernel {name!r}: expected one of {', '.join(benches)}")
    if device.type != "cuda":
        raise UserError(f"bench.py kernel: --device is {device}; kernels are timed on a GPU")
    test = ROOT / "tests" / "kernels" / f"test_{name}.py"
    if not skip_test:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(test)], cwd=ROOT)
        if done.returncode:
            raise UserError(f"{test.relative_to(ROOT)} fails, so nothing is timed")
    # autograd runs a backward pass on the stream of its forward pass, so both must run on the
    # stream that is captured
    with torch.cuda.stream(one_stream()):
        benches[name]()


@functools.cache
def one_stream() -> torch.cuda.Stream:
    """Return the CUDA stream on which every run is captured, always the same."""
    return torch.cuda.Stream()


def rand(*shape: int, scale: float = 0.5) -> Tensor:
    """Return a bfloat16 CUDA tensor of random normal numbers with standard deviation `scale`."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


def microseconds(runs: Runs, launches: int = 10, repeats: int = 15) -> dict[str, float]:
    """Return the median microseconds per call of each run.

    A run is captured as a CUDA graph of `launches` calls, which excludes launch overhead. Replays
    of the runs are interleaved, so that a change of GPU clocks affects all runs equally.
    """
    graphs, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=one_stream()):
            for _ in range(launches):
                run()
        graphs[name] = graph
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(1e3 * start.elapsed_time(stop) / launches)
    return {name: statistics.median(t) for name, t in times.items()}


def table(title: str, runs: Runs, ours: str, moved: float = 0.0, launches: int = 10) -> None:
    """Print a table with a row per run: time, bandwidth, and time relative to the run `ours`.

    moved: bytes that one call reads and writes; 0: print no bandwidth.
    """
    times = microseconds(runs, launches)
    print(f"\n{title}\n\n| | us | TB/s | times ours |\n|---|---|---|---|")
    for name, us in times.items():
        rate = f"{moved / us / 1e6:.2f}" if moved and name == ours else ""
        print(f"| {name} | {us:.1f} | {rate} | {us / times[ours]:.2f} |", flush=True)


def both_passes(f: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Callable:
    """Return a function that runs f on the leaves, then computes their gradients by autograd."""

    def run():
        y = f(*leaves)
        return torch.autograd.grad(y, [x for x in leaves if x.requires_grad], grad)

    return run


def liger():
    """Return Liger's functional module, or None if it is not installed."""
    try:
        import liger_kernel.transformers.functional as functions
    except ImportError:
        print("liger-kernel is not installed: no column for it")
        return None
    return functions


# ------------------------------------------------------------------------------------ elementwise


def rms_norm() -> None:
    """Time the fused residual addition and RMSNorm, forward and backward."""
    from minisft.kernels.rms_norm import add_rms_norm, rms_norm_backward

    functions = liger()
    for shape, (D, *_) in SHAPES.items():
        x, y, dh = rand(T, D), rand(T, D), rand(T, D)
        weight = torch.ones(D, device="cuda", dtype=torch.bfloat16)
        leaves = [x.requires_grad_(), y.requires_grad_()]

        def eager(x, y, weight=weight):
            s = x + y
            s32 = s.float()
            n = s32 * torch.rsqrt(s32.pow(2).mean(-1, keepdim=True) + 1e-5)
            return weight * n.to(s.dtype)

        def ours(x=x.detach(), y=y.detach(), weight=weight, dh=dh):
            s, h, rstd = add_rms_norm(x, y, weight, 1e-5)
            return h, rms_norm_backward(dh, s, weight, rstd)

        runs: Runs = {
            "ours": ours,
            "eager": both_passes(eager, leaves, dh),
            "torch.compile": both_passes(torch.compile(eager), leaves, dh),
        }
        if functions:

            def theirs(x, y, weight=weight):
                return functions.liger_fused_add_rms_norm(x, y, weight, 1e-5)[0]

            runs["Liger"] = both_passes(theirs, leaves, dh)
        table(f"Sum and RMSNorm, forward + backward, {shape}, {T} x {D}", runs, "ours", 14 * D * T)


def rope() -> None:
    """Time RoPE of q and k in place, forward and backward."""
    from minisft.kernels.rope import rope_, rope_backward

    functions = liger()
    for shape, (_, _, N, K, H) in SHAPES.items():
        qkv = rand(T, (N + 2 * K) * H)
        angles = torch.rand(T, H // 2, device="cuda").repeat(1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        q, k = rand(1, N, T, H).requires_grad_(), rand(1, K, T, H).requires_grad_()
        grads = (rand(T, N, H), rand(T, K, H), rand(T, K, H))
        dq, dk = rand(1, N, T, H), rand(1, K, T, H)

        def rotate(x, cos=cos, sin=sin):
            x1, x2 = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-x2, x1), dim=-1) * sin

        def eager(q, k):
            return rotate(q), rotate(k)

        def run(f, q=q, k=k, dq=dq, dk=dk):
            return lambda: torch.autograd.grad(f(q, k), (q, k), (dq, dk))

        def ours(qkv=qkv, cos=cos, sin=sin, N=N, K=K, grads=grads):
            rope_(qkv, cos, sin, N + K)
            rope_backward(grads, cos, sin, qkv)

        runs: Runs = {
            "ours": ours,
            "eager": run(eager),
            "torch.compile": run(torch.compile(eager)),
        }
        if functions:

            def theirs(q, k, cos=cos[None], sin=sin[None]):
                return functions.liger_rope(q, k, cos, sin)

            runs["Liger"] = run(theirs)
        moved = T * H * (2 * 2 * (N + K) + 2 * 2 * (N + 2 * K))
        table(f"RoPE of Q and K, forward + backward, {shape}", runs, "ours", moved)
    print("\nOurs works in place; its backward pass also copies the gradient of V.")


def swiglu() -> None:
    """Time SwiGLU, forward and backward, without and with the fused LoRA weight gradients."""
    from minisft.kernels.swiglu import swiglu as forward
    from minisft.kernels.swiglu import swiglu_backward_

    functions = liger()
    for shape, (_, ffn, *_) in SHAPES.items():
        gate_up, da = rand(T, 2 * ffn), rand(T, ffn)
        leaves = [gate_up[:, :ffn].contiguous().requires_grad_(), rand(T, ffn).requires_grad_()]
        lefts = (rand(T, 16), rand(T, 16), rand(T, 16))
        partials = (
            torch.empty(8, ffn, 16, device="cuda"),
            torch.empty(8, ffn, 16, device="cuda"),
            torch.empty(8, 16, ffn, device="cuda"),
        )

        def eager(g, u):
            return F.silu(g) * u

        def ours(gate_up=gate_up, da=da, ffn=ffn):
            forward(gate_up, ffn)
            swiglu_backward_(gate_up, da)

        def with_lora(gate_up=gate_up, da=da, ffn=ffn, lefts=lefts, partials=partials):
            forward(gate_up, ffn)
            swiglu_backward_(gate_up, da, lefts=lefts, partials=partials)

        runs: Runs = {
            "ours": ours,
            "ours, with dB of gate and up and dA of down": with_lora,
            "eager": both_passes(eager, leaves, da),
            "torch.compile": both_passes(torch.compile(eager), leaves, da),
        }
        if functions:
            runs["Liger"] = both_passes(lambda g, u: functions.liger_swiglu(g, u), leaves, da)
        table(f"SwiGLU, forward + backward, {shape}, {T} x {ffn}", runs, "ours", 16 * ffn * T)


# ------------------------------------------------------------------------------------- matmuls


def cross_entropy() -> None:
    """Time loss and input gradient of a linear head, with 100 % and 60 % of the rows labelled."""
    from minisft.kernels.linear_cross_entropy import linear_cross_entropy_grad

    functions, V = liger(), 128256
    for shape, (D, *_) in SHAPES.items():
        hidden, head = rand(T, D), rand(V, D, scale=0.02)
        targets = torch.randint(V, (T,), device="cuda")
        leaf = hidden.clone().requires_grad_()
        weight = torch.full((1,), 1 / T, device="cuda")
        one = torch.ones((), device="cuda")

        def eager(h, head=head, targets=targets):
            return F.cross_entropy((h @ head.T).float(), targets)

        # 60 % of the tokens are labelled in GSM8K. As in the explicit pass, labelled rows are
        # padded to a fixed number, here 3/4 of all rows.
        labelled = torch.rand(T, device="cuda") < 0.6
        some = targets.where(labelled, -100)
        rows = F.pad(labelled.nonzero().squeeze(1), (0, 3 * T // 4 - int(labelled.sum())))
        of_rows = F.pad(targets[labelled], (0, len(rows) - int(labelled.sum())), value=-1)

        def ours_some(h=hidden, w=head, rows=rows, targets=of_rows, s=weight):
            loss, d = linear_cross_entropy_grad(h[rows], w, targets, s, chunk=T)
            return loss, torch.zeros_like(h).index_add_(0, rows, d)

        runs: Runs = {
            "ours": lambda h=hidden, w=head, t=targets, s=weight: linear_cross_entropy_grad(
                h, w, t, s, chunk=T
            ),
            "ours, 2048 rows at a time": lambda h=hidden, w=head, t=targets, s=weight: (
                linear_cross_entropy_grad(h, w, t, s, chunk=2048)
            ),
            "eager": both_passes(eager, [leaf], one),
            "torch.compile": both_passes(torch.compile(eager), [leaf], one),
            "the two matmuls alone": lambda h=hidden, w=head: (h @ w.T) @ w,
            "ours, 60 % labelled": ours_some,
            "eager, 60 % labelled": both_passes(
                functools.partial(eager, targets=some), [leaf], one
            ),
        }
        if functions:

            def theirs(h, head=head, targets=targets):
                return functions.liger_fused_linear_cross_entropy(h, head, targets)

            call = both_passes(theirs, [leaf], one)
            runs["Liger"] = call
        if shape == "1b":
            cross_entropy_of_logits(targets[:2048], weight, V)
        try:
            table(f"Linear cross-entropy, {shape}, {T} x {D} x {V}", runs, "ours", launches=2)
        # Liger's op copies a value to the host, which CUDA graphs cannot capture: leave it out.
        except RuntimeError:
            runs.pop("Liger")
            torch.cuda.synchronize()
            table(f"Linear cross-entropy, {shape}, {T} x {D} x {V}", runs, "ours", launches=2)


def cross_entropy_of_logits(targets: Tensor, weight: Tensor, V: int) -> None:
    """Time loss and gradient of given logits, without the matmuls of the head.

    targets: int64 [rows]; the logits are [rows, V].
    """
    from minisft.kernels.linear_cross_entropy.kernel import launch_cross_entropy_

    rows = len(targets)
    logits, losses = rand(rows, V), torch.empty(rows, device="cuda")
    z, one = rand(rows, V).requires_grad_(), torch.ones((), device="cuda")

    def alone(z):
        return F.cross_entropy(z.float(), targets)

    runs: Runs = {
        "ours": lambda: launch_cross_entropy_(logits, targets, losses, weight, gradient=True),
        "eager": both_passes(alone, [z], one),
        "torch.compile": both_passes(torch.compile(alone), [z], one),
    }
    title = f"Cross-entropy of given logits, {rows} x {V}"
    table(title, runs, "ours", 4.0 * rows * V, launches=2)


def low_rank() -> None:
    """Time the LoRA weight gradient dA = t^T x against cuBLAS."""
    from minisft.kernels.low_rank import outer_sum

    for shape, (D, ffn, *_) in SHAPES.items():
        for N in (D, ffn):
            left, x = rand(T, 16), rand(T, N)
            partials = torch.empty(8, 16, N, device="cuda")
            runs: Runs = {
                "ours (8 ordered parts)": lambda a=left, x=x, p=partials: outer_sum(a, x, p),
                "cuBLAS": lambda a=left, x=x: a.T @ x,
            }
            title = f"dA = t^T x, {shape}, {T} x 16, {T} x {N}"
            table(title, runs, "ours (8 ordered parts)", 2.0 * N * T)


def nf4() -> None:
    """Time NF4 decoding against bitsandbytes, with and without programmatic dependent launch."""
    import bitsandbytes.functional as bnb
    from minisft.kernels.nf4 import dequantize_into, quantize
    from minisft.kernels.nf4.cases import BENCH_SHAPES

    n = 1 << 28
    source, target = rand(n), rand(n)
    copied = microseconds({"copy": lambda: torch.add(source, 0, out=target)}, launches=4)["copy"]
    print(f"\ncopy of 512 MiB: {4 * n / copied / 1e6:.2f} TB/s")
    print("\n| shape | ours us | TB/s | of the copy | waiting us | bitsandbytes us | times |")
    print("|---" * 7 + "|")
    for O, I in BENCH_SHAPES:
        copies = max(4, (1 << 29) // (O * I))
        weights = [quantize(rand(O, I, scale=0.02)) for _ in range(copies)]
        outs = [torch.empty(O, I, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        states = [
            bnb.quantize_4bit(rand(O, I, scale=0.02), quant_type="nf4", compress_statistics=True)
            for _ in range(copies)
        ]

        def ours(pdl, weights=weights, outs=outs):
            for weight, out in zip(weights, outs, strict=True):
                dequantize_into(weight, out, pdl=pdl)

        def theirs(states=states, outs=outs):
            for (packed, state), out in zip(states, outs, strict=True):
                bnb.dequantize_4bit(packed, state, out=out)

        runs: Runs = {
            "ours": lambda ours=ours: ours(True),
            "waiting": lambda ours=ours: ours(False),
            "bitsandbytes": theirs,
        }
        times = {name: t / copies for name, t in microseconds(runs, launches=1).items()}
        us, bnb_us = times["ours"], times["bitsandbytes"]
        rate = O * I * (2.5 + 1 / 64) / us / 1e6
        share = rate / (4 * n / copied / 1e6)
        print(
            f"| {O} x {I} | {us:.1f} | {rate:.2f} | {share:.0%} | {times['waiting']:.1f} | "
            f"{bnb_us:.1f} | {bnb_us / us:.2f} |",
            flush=True,
        )


def nf4_lora_linear() -> None:
    """Time the NF4 LoRA linear against bitsandbytes + PEFT, and against matmuls of cuBLAS."""
    import bitsandbytes as bnb
    from minisft.kernels.nf4 import quantize
    from minisft.kernels.nf4_lora_linear import Adapter, backward, forward
    from minisft.kernels.nf4_lora_linear.cases import BENCH_ROWS, BENCH_SHAPES

    print(
        "\n| O x I | rows | pass | ours | (a) bnb + PEFT | (b) decode + 3 products | (c) product "
        "alone | a / ours | b / ours | ours / (c + bytes) |\n" + "|---" * 10 + "|"
    )
    for O, I in BENCH_SHAPES:
        weight, dense = quantize(rand(O, I, scale=0.02)), rand(O, I, scale=0.02)
        A, B = rand(16, I), rand(O, 16)
        adapted, packed, state = peft_linear(dense)
        for rows in BENCH_ROWS:
            x, dy = rand(rows, I), rand(rows, O)
            u = x @ A.T

            def decode(packed=packed, state=state):
                return bnb.functional.dequantize_4bit(packed, state)

            def b_forward(x=x, A=A, B=B):
                return torch.addmm(x @ decode().T, x @ A.T, B.T)

            def b_backward(x=x, dy=dy, A=A, B=B, u=u):
                t = dy @ B
                return torch.addmm(dy @ decode(), t, A), t.T @ x, dy.T @ u

            leaf = x.clone().requires_grad_()
            y = adapted(leaf)
            leaves = [leaf, *(p for p in adapted.parameters() if p.requires_grad)]
            passes = {
                "forward": {
                    "ours": lambda x=x: forward(x, weight, None, Adapter(A, B, 1.0)),
                    "a": lambda x=x: adapted(x),
                    "b": b_forward,
                    "c": lambda x=x: x @ dense.T,
                },
                "backward": {
                    "ours": lambda x=x, dy=dy, u=u: backward(dy, x, u, weight, Adapter(A, B, 1.0)),
                    "a": lambda y=y, dy=dy, leaves=leaves: torch.autograd.grad(
                        y, leaves, dy, retain_graph=True
                    ),
                    "b": b_backward,
                    "c": lambda dy=dy: dy @ dense,
                },
            }
            for what, runs in passes.items():
                further = I if what == "forward" else O + I
                moved = O * I * (2.5 + 1 / 64) + 2 * rows * further
                with torch.no_grad() if what == "forward" else torch.enable_grad():
                    t = microseconds(runs, launches=5, repeats=9)
                bound = t["c"] + moved / 4.24e6
                print(
                    f"| {O} x {I} | {rows} | {what} | {t['ours']:.1f} | {t['a']:.1f} | "
                    f"{t['b']:.1f} | {t['c']:.1f} | {t['a'] / t['ours']:.2f} | "
                    f"{t['b'] / t['ours']:.2f} | {t['ours'] / bound:.2f} |",
                    flush=True,
                )


def peft_linear(dense: Tensor) -> tuple:
    """Return (PEFT LoRA layer of rank 16, packed 4-bit weight, quant state).

    dense: the weight [O, I] that bitsandbytes' Linear4bit quantises to NF4.
    """
    import bitsandbytes as bnb
    import peft

    O, I = dense.shape
    linear = bnb.nn.Linear4bit(
        I, O, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    linear.weight = bnb.nn.Params4bit(
        dense.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    module = torch.nn.ModuleDict({"proj": linear}).cuda()
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["proj"])
    peft.inject_adapter_in_model(lora, module)
    return module["proj"].to(torch.bfloat16), linear.weight.data, linear.weight.quant_state


# ------------------------------------------------------------------------------------ optimizer


def adamw() -> None:
    """Time norm, clipping and AdamW on one flat LoRA buffer of rank 16, and per-tensor updates."""
    from minisft.kernels.adamw import global_norm
    from random_model import config_json

    from minisft.config.hf import parse_model_config
    from minisft.config.lora import LoraConfig
    from minisft.config.train import TrainConfig
    from minisft.lora import allocate, param_groups, trainable_shapes
    from minisft.optim import init_moments, update_

    def flat_rule(p, g, m, v):
        g = g * (1.0 / (torch.linalg.vector_norm(g) + 1e-6)).clamp(max=1.0)
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        p.mul_(1 - 1e-6).addcdiv_(m, v.sqrt().add_(1e-8), value=-1e-4)

    config = TrainConfig(model="", dataset=(), weight_decay=0.01, learning_rate=1e-4)
    for shape in SHAPES:
        cfg = parse_model_config(config_json(shape, 128256))
        shapes = trainable_shapes(LoraConfig(), cfg)
        trainable = allocate(shapes, torch.device("cuda"))
        n = trainable.buffer.numel()
        grads = torch.randn(n, device="cuda")
        slices = param_groups(shapes, config)
        moments = init_moments(trainable, slices, "adamw")
        params = [torch.nn.Parameter(view.clone()) for view in trainable.views.values()]
        for p in params:
            p.grad = torch.randn_like(p)

        def ours(trainable=trainable, grads=grads, moments=moments, slices=slices):
            norm = global_norm(grads)
            update_(trainable, grads, moments, slices, norm=norm, step=2, config=config)

        def one_by_one(optimizer, params=params):
            def run():
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()

            return run

        compiled = torch.compile(flat_rule)
        given = [torch.rand(n, device="cuda") for _ in range(4)]
        runs: Runs = {
            "ours": ours,
            "eager (foreach)": one_by_one(torch.optim.AdamW(params, lr=1e-4, capturable=True)),
            "eager (fused)": one_by_one(
                torch.optim.AdamW(params, lr=1e-4, fused=True, capturable=True)
            ),
            "torch.compile of the flat rule": lambda given=given, f=compiled: f(*given),
        }
        # 8 accesses of 4 bytes per parameter: the norm reads g; AdamW reads g, and reads and writes
        # p, m and v.
        title = f"Clip and AdamW, {shape}, {n:,} parameters in {len(shapes)} tensors"
        table(title, runs, "ours", 32.0 * n)
