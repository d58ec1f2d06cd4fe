"""PiSSA and OLoRA: PEFT's start, PEFT's logits from what is written, and a run that resumes."""

from __future__ import annotations

import dataclasses
import shutil
import warnings

import pytest
import torch
from runs import call, flags, pairs, read, train, write_model, write_rows
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from minisft.kernels.nf4 import dequantize, quantize  # noqa: E402

import minisft.run  # noqa: E402
from minisft.config.errors import UserError  # noqa: E402
from minisft.config.lora import LoraConfig  # noqa: E402
from minisft.config.targets import adapter_shapes  # noqa: E402
from minisft.config.train import TrainConfig  # noqa: E402
from minisft.files.load import load_base  # noqa: E402
from minisft.files.weights import load_model_config  # noqa: E402
from minisft.llama import logits, make_tokens  # noqa: E402

IDS = [[0, 9, 77, 300, 4, 60, 21, 8], [0, 5, 6, 200]]
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
KINDS = ("pissa", "pissa_niter_4", "olora")
COMMON = {"lora_r": 4, "lora_alpha": 8, "target_modules": TARGETS}
PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 6}}
PATTERNS |= {"alpha_pattern": {"o_proj": 2, "v_proj": 3}, "use_rslora": True}
INTERPLAY = {
    "plain": {},
    "patterns, rslora": PATTERNS,
    "dora": {"use_dora": True},
    "copies": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": [9, 77]},
    "dropout": {"lora_dropout": 0.2},
    "explicit": {"step_impl": "explicit"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("residual")
    write_model(directory / "model", attention_bias=True)
    write_model(directory / "tied", tie_word_embeddings=True)
    write_rows(directory / "rows.jsonl", pairs(12))
    return directory


def base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def their_logits(model):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in IDS])


def our_logits(model, state):
    compute = dataclasses.replace(model.compute, lora_dropout=0.0)
    with torch.no_grad():
        return logits(state.trainable.views, model.frozen, make_tokens(IDS), compute)


def start(directory, **settings):
    """Ours before the first step."""
    config = TrainConfig(model=str(directory), device="cpu", **COMMON | settings)
    return *load_base(config), config.lora


def part(model, state, lora, path):
    A, B = (state.trainable.views[f"{path}.lora_{x}.weight"] for x in "AB")
    return lora.scaling_of(path) * (B @ A)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA:UserWarning")  # PEFT's conversion
@pytest.mark.parametrize(
    "settings", [{}, PATTERNS, {"use_dora": True}], ids=["plain", "patterns", "dora"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_peft_s_and_computes_what_the_base_does(place, kind, settings):
    """Singular vectors have no sign: the products are compared, and what they leave."""
    model, state, lora = start(
        place / "model", load_in_4bit=False, init_lora_weights=kind, **settings
    )
    want = their_logits(base(place / "model"))
    assert (our_logits(model, state) - want).abs().max() < 1e-5
    theirs = peft.get_peft_model(
        base(place / "model"),
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM",
            init_lora_weights=kind.partition("_")[0], **settings,
        ),
    )  # fmt: skip
    whole = load_file(place / "model" / "model.safetensors")
    paths = [n.removesuffix(".lora_A.weight") for n in state.trainable.views if "lora_A" in n]
    assert len(paths) == 8
    for path in paths:
        linear = theirs.get_submodule(f"base_model.model.{path}")
        rest, product = linear.base_layer.weight.data, linear.get_delta_weight("default")
        ours, W = part(model, state, lora, path), whole[f"{path}.weight"]
        assert (model.frozen[f"{path}.weight"] + ours - W).abs().max() < 1e-6
        if kind == "pissa_niter_4":  # of all of that rank, the best one leaves least
            assert 0.9999 < (W - ours).norm() / rest.norm() < 1.01
        else:
            assert (model.frozen[f"{path}.weight"] - rest).abs().max() < 1e-5
            assert (ours - product).abs().max() < 1e-5 and product.abs().max() > 0.02


@pytest.fixture
def live(monkeypatch):
    """(model, state) of each run as it is exported."""
    seen, export = [], minisft.session.finish.export

    def watched(run, metrics):
        seen.append((run.base, run.state))
        export(run, metrics)

    monkeypatch.setattr(minisft.session.finish, "export", watched)
    return seen


@pytest.mark.parametrize(
    ("kind", "name", "of"),
    [("pissa", name, "model") for name in INTERPLAY if name != "explicit"]
    + [
        ("olora", "explicit", "tied"),
        ("pissa_niter_4", "plain", "model"),
        ("olora", "patterns, rslora", "model"),
    ]
    + [("pissa", "plain", "tied"), ("olora", "copies", "tied")],
)
def test_on_the_base_as_it_was_peft_gives_the_live_logits(place, tmp_path, live, kind, name, of):
    """Of the result, of a checkpoint and of the merged model."""
    settings = {
        k: [f"{a}={b}" for a, b in v.items()] if isinstance(v, dict) else v
        for k, v in INTERPLAY[name].items()
    }
    out = tmp_path / "out"
    train(
        model=place / of, dataset=place / "rows.jsonl", output_dir=out, max_steps=3,
        learning_rate=1e-2, load_in_4bit=False, init_lora_weights=kind, save_merged=True,
        **COMMON, **settings,
    )  # fmt: skip
    want = our_logits(*live[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = their_logits(peft.PeftModel.from_pretrained(base(place / of), out))
    assert (theirs - want).abs().max() < 1e-4
    assert (want - their_logits(base(place / of))).abs().max() > 0.05
    merged = base(out / "merged")
    assert (their_logits(merged) - want).abs().max() < 2e-4
    names = ("adapter_model.safetensors", "adapter_config.json")
    last = [(out / "checkpoint-3" / name).read_bytes() for name in names]
    assert last == [(out / name).read_bytes() for name in names]
    raw = read(out / "adapter_config.json")
    assert raw["r"] == 8 and raw["init_lora_weights"] is True


@pytest.mark.parametrize("kind", ["pissa_niter_4", "olora"])
def test_resuming_takes_the_start_from_the_checkpoint(place, tmp_path, monkeypatch, kind):
    """Bit for bit, on a machine whose decomposition is another one; the best one is exported."""
    settings = {"model": place / "model", "dataset": place / "rows.jsonl", "save_steps": 2}
    settings |= {"max_steps": 4, "learning_rate": 1e-2, "init_lora_weights": kind, **COMMON}
    settings |= {"eval_dataset": place / "rows.jsonl", "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "greater_is_better": True, "optim": "adamw_8bit"}
    train(**settings, output_dir=tmp_path / "whole")
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(tmp_path / "whole" / name, tmp_path / "out" / name)
    resumed = settings | {"output_dir": tmp_path / "out", "resume_from_checkpoint": "auto"}
    assert call("train", flags(**resumed, dry_run=True)).code == 0
    refused = call("train", flags(**resumed | {"lora_r": 2}))
    assert refused.code == 2 and "--lora-r was 4, now 2" in refused.err
    monkeypatch.setattr("minisft.variants.pissa.initial_lora", None)
    train(**resumed)
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    ends = [
        [(tmp_path / d / "checkpoint-4" / n).read_bytes() for n in names] for d in ("whole", "out")
    ]
    assert ends[0] == ends[1]
    best = read(tmp_path / "whole" / "train_output.json")["metrics"]["best_step"]
    assert best == 1  # the greatest loss
    for out in (tmp_path / "whole", tmp_path / "out"):
        assert (out / names[0]).read_bytes() == (out / "checkpoint-1" / names[0]).read_bytes()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_in_4_bits_it_is_the_rest_that_is_quantised(place, tmp_path, kind):
    model, state, lora = start(place / "model", init_lora_weights=kind)
    whole = load_file(place / "model" / "model.safetensors")
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rest = whole[f"{path}.weight"] - part(model, state, lora, path)
        want = dequantize(quantize(rest), torch.float32)
        assert torch.equal(dequantize(model.frozen[f"{path}.weight"], torch.float32), want)
    settings = {"model": place / "model", "dataset": place / "rows.jsonl", "max_steps": 2}
    done = train(**settings, **COMMON, init_lora_weights=kind, output_dir=tmp_path / "out")
    assert "load it on the base in 16 bits" in done.out
    assert "BitsAndBytes" not in done.out
    assert "quantization_config" not in (tmp_path / "out" / "README.md").read_text()
    answer = call("generate", flags(adapter=tmp_path / "out", prompt="a", max_new_tokens=3))
    plain = call(
        "generate",
        flags(adapter=tmp_path / "out", prompt="a", max_new_tokens=3, load_in_4bit="false"),
    )
    assert answer == plain and answer.code == 0


def test_a_base_in_4_bits_is_refused_or_decoded(place, tmp_path):
    out = tmp_path / "nf4"
    assert call("quantize", flags(model=place / "model", output_dir=out)).code == 0
    with pytest.raises(UserError, match="would quantise what is left of it a second time"):
        start(out, init_lora_weights="pissa")
    model, state, _ = start(out, init_lora_weights="pissa", load_in_4bit=False)
    plain, fresh, _ = start(out, load_in_4bit=False)
    assert (our_logits(model, state) - our_logits(plain, fresh)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 33}, r"rank of .* is 33; expected at most 32, .* of \[32, 32\], for .* pissa"),
        ({"rank_pattern": (("v_proj", 17),)}, r"is 17; expected at most 16, .* of \[16, 32\]"),
        ({"lora_embeddings": True}, "does not go with init_lora_weights pissa; drop one"),
    ],
)
def test_what_cannot_start_so_is_told(place, settings, message):
    cfg = load_model_config(place / "model")
    adapter_shapes(LoraConfig(**{"r": 16} | settings), cfg)
    with pytest.raises(UserError, match=message):
        adapter_shapes(LoraConfig(**{"r": 16} | settings, init_lora_weights="pissa"), cfg)


def test_a_weight_that_is_not_finite_is_told(tmp_path):
    from safetensors.torch import save_file

    model = write_model(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][3, 4] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1\.self_attn\.v_proj\.weight holds a value that is not"):
        start(model, init_lora_weights="pissa")
