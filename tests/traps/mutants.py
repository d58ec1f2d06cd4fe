"""Every trap's bug, put in on purpose: the trap's test must fail.

    python tests/traps/mutants.py          all of them; prints a line each, and N/27 caught
    python tests/traps/mutants.py 5 18     these traps only

A mutant is one replacement in one file of a copy of the repository. Each runs in a child that is
forked from a process that has loaded torch but not minisft.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """A bug: in `file`, `old` (it occurs once) becomes `new`."""

    trap: int
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        1, "minisft/step.py",
        "        (loss * weight).backward()",
        "        (loss / micro.targets_M.numel() / len(batch.micro_batches)).backward()",
    ),
    Mutant(
        2, "minisft/nn.py",
        "    lengths = documents.lengths\n    if len(set(lengths)) == 1:",
        "    lengths = (sum(documents.lengths),)\n    if len(set(lengths)) == 1:",
    ),
    Mutant(
        3, "minisft/batches.py",
        "torch.cat([torch.arange(n) for n in lengths]).to(device)",
        "torch.arange(sum(lengths)).to(device)",
    ),
    Mutant(4, "minisft/batches.py", "    labels[cu[:-1]] = IGNORED\n", "    labels[0] = IGNORED\n"),
    Mutant(
        5, "minisft/data/one_row.py",
        'completion += "" if completion.endswith(eos) else eos',
        'completion += ""',
    ),
    Mutant(
        6, "minisft/text/chat.py",
        "            spans.append((start, len(text)))",
        '            spans.append((start, len(text.removesuffix("<|eot|>"))))',
    ),
    Mutant(
        7, "minisft/text/chat.py",
        "        if piece == _OPEN:\n            start = len(text)",
        "        if piece == _OPEN:\n            start = 0",
    ),
    Mutant(
        8, "minisft/data/tokenize.py",
        "add_special_tokens=not is_chat)",
        "add_special_tokens=True)",
    ),
    Mutant(
        9, "minisft/text/tokenizer.py",
        '        out[path] = text.encode("utf-8")',
        '        out[path] = text.strip("{").encode("utf-8")',
    ),
    Mutant(
        10, "minisft/batches.py",
        "return MicroBatch(tokens, (predicted - 1).to(device)",
        "return MicroBatch(tokens, (predicted - 0).to(device)",
    ),
    Mutant(
        11, "minisft/step.py",
        "        if micro.targets_M.numel() == 0:\n            continue",
        "        if micro.targets_M.numel() == 0:\n            weight = weight / 2",
    ),
    Mutant(
        12, "minisft/loss.py",
        "torch.stack([x.sum(dtype=torch.float64) for x in",
        "torch.stack([x.to(torch.float64).mean() for x in",
    ),
    Mutant(
        13, "minisft/batches.py",
        "(micro * self.world + rank) * self.batch_size",
        "(micro * self.world) * self.batch_size",
    ),
    Mutant(
        14,
        "minisft/step.py",
        "        leaves[name].grad = grads.views[name]",
        "        leaves[name].grad = grads.views[name]\n"
        '        leaves[name] = view.detach() if "v_proj" in name else leaves[name]',
    ),
    Mutant(
        15, "minisft/step.py",
        "    if scaled:\n        state.good_steps",
        "    state.trainable.buffer.copy_(state.trainable.buffer.bfloat16())\n"
        "    if scaled:\n        state.good_steps",
    ),
    Mutant(16, "minisft/nn.py", "    x32_TD = x_TD.float()\n", "    x32_TD = x_TD\n"),
    Mutant(
        17, "minisft/step.py",
        "    applied = _finite(loss_value) and _finite(norm_value)",
        "    applied = True",
    ),
    Mutant(
        18,
        "minisft/files/checkpoint.py",
        "    _fill(path / OPTIMIZER, _optimizer_tensors(state))",
        "    pass",
    ),
    Mutant(
        19, "minisft/run.py",
        "        factor = lr_factor(state.step, last, config)",
        "        factor = lr_factor(state.step + 1, last, config)",
    ),
    Mutant(
        20, "minisft/session/merge.py",
        '    four_bit = weights.four_bit_names(checkpoint, base == "dequant")',
        '    four_bit = weights.four_bit_names(checkpoint, False)',
    ),
    Mutant(
        21, "minisft/session/merge.py",
        "        if name in tensors:  # a trained copy\n",
        "        if name in tensors and False:\n",
    ),
    Mutant(
        22,
        "minisft/data/load.py",
        '    highest = dataset.stats["max_token_id"]\n    if highest >= vocab_size:',
        '    highest = dataset.stats["max_token_id"]\n    if highest < 0:',
    ),
    Mutant(
        23, "minisft/rope.py",
        '    if rope.rope_type == "llama3":',
        '    if rope.rope_type == "llama-3":',
    ),
    Mutant(
        24, "minisft/files/adapter_config.py",
        "    alpha = lora.lora_alpha\n",
        "    alpha = 16\n",
    ),
    Mutant(
        25, "minisft/text/encoding.py",
        r'return tokenizer.special_text.sub(rf"{TEXT_OPEN}\g<0>{TEXT_CLOSE}", value)',
        "return value",
    ),
    Mutant(
        26, "minisft/data/load.py",
        '        "settings": dataclasses.asdict(settings),\n',
        "",
    ),
    Mutant(
        27, "minisft/session/guards.py",
        "    if not skipped and trace(state)[1] == before[1]:",
        "    if False:",
    ),
]  # fmt: skip


def occurrences(mutant: Mutant) -> int:
    """How often the mutant's text occurs in its file; it must be 1, or the mutant is outdated."""
    return (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def tested(copy: Path, number: int) -> int:
    """pytest's exit code for a trap's tests in a copy of the repository, from a forked child."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        os.chdir(copy)
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import pytest

        code = int(
            pytest.main(
                ["-x", "-q", "-p", "no:cacheprovider", "-k", f"test_t{number:02}_",
                 str(copy / "tests" / "traps" / "test_traps.py")]
            )
        )  # fmt: skip
    finally:
        os._exit(code)


def main(numbers: list[int]) -> int:
    """Run the mutants of these traps; the number that no test caught."""
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import tyro  # noqa: F401

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ.pop("PYTHONPATH", None)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    chosen = [m for m in MUTANTS if m.trap in numbers]
    caught = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        skipped = shutil.ignore_patterns("__pycache__", ".git", "*.pyc")
        for name in ("minisft", "kernels", "scripts", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=skipped)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutant in chosen:
            started = time.perf_counter()
            file = copy / mutant.file
            source = file.read_text(encoding="utf-8")
            assert source.count(mutant.old) == 1, mutant
            sound = tested(copy, mutant.trap)
            file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
            code = tested(copy, mutant.trap)
            file.write_text(source, encoding="utf-8")
            verdict = "caught" if (sound, code) == (0, 1) else f"NOT CAUGHT ({sound}, {code})"
            caught += verdict == "caught"
            seconds = time.perf_counter() - started
            print(f"T{mutant.trap:<3}{verdict:10} {seconds:5.1f} s  {mutant.file}", flush=True)
    print(f"{caught}/{len(chosen)} caught")
    return len(chosen) - caught


if __name__ == "__main__":
    sys.exit(min(1, main([int(n) for n in sys.argv[1:]] or list(range(1, 28)))))
