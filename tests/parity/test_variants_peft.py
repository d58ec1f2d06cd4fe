"""DoRA, patterns, single layers, initialisations: PEFT reads ours, we read PEFT's."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from runs import call, flags, pairs, read, train, write_model, write_rows
from safetensors.torch import load_file, save_file
from tiny_llama import CFG, all_rows, random_dataset, random_weights

# Our reader's own, where a module is named and excluded as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*for which the file has no tensors:UserWarning")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from minisft.config.errors import UserError  # noqa: E402
from minisft.config.lora import LoraConfig  # noqa: E402
from minisft.config.model import ModelConfig  # noqa: E402
from minisft.config.targets import (  # noqa: E402
    TOKEN_ROWS,
    adapter_shapes,
    check_patterns,
    match_targets,
    scaling_ratios,
)
from minisft.config.train import TrainConfig  # noqa: E402
from minisft.files.adapter import load_adapter  # noqa: E402
from minisft.files.weights import load_model_config  # noqa: E402
from minisft.llama import TOKEN_IDS, Compute, logits, make_tokens  # noqa: E402
from minisft.lora import allocate, init_lora_, trainable_shapes  # noqa: E402
from minisft.session.serving import vllm_problems  # noqa: E402
from minisft.step import ExecutionPlan, loss_and_grads  # noqa: E402

IDS = [[0, 9, 77, 300, 4, 60, 21, 8], [0, 5, 6, 200]]
VARIANTS = {  # our flags -> PEFT's settings
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "dora, rslora": (
        {"use_dora": True, "use_rslora": True},
        {"use_dora": True, "use_rslora": True},
    ),
    "patterns": (
        {
            "rank_pattern": ["layers.0.self_attn.q_proj=2", "v_proj=6"],
            "alpha_pattern": [r"^model\.layers\.1\.self_attn\.q_proj=32"],
            "use_rslora": True,
        },
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 6},
            "alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 32},
            "use_rslora": True,
        },
    ),
    "patterns, dora": (
        {"rank_pattern": ["down_proj=3"], "alpha_pattern": ["o_proj=1"], "use_dora": True},
        {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"o_proj": 1}, "use_dora": True},
    ),
    "one layer": ({"layers_to_transform": [1]}, {"layers_to_transform": [1]}),
    "excluded": (
        {"exclude_modules": ["0.self_attn.q_proj", "down_proj"]},
        {"exclude_modules": ["0.self_attn.q_proj", "down_proj"]},
    ),
    "excluded by a pattern": (
        {"exclude_modules": r"re:.*\.0\..*(q|v)_proj"},
        {"exclude_modules": r".*\.0\..*(q|v)_proj"},
    ),
    "token rows": ({"trainable_token_indices": [9, 77, 4]},) * 2,
    "gaussian": ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
}
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
COMMON = {"lora_r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("variants")
    write_model(directory / "model", attention_bias=True)
    write_rows(directory / "rows.jsonl", pairs(12))
    return directory


def theirs(directory, adapter=None, **settings):
    """A PEFT model on the base, from a directory or fresh."""
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter is not None:
        return peft.PeftModel.from_pretrained(base, adapter)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **settings
    )
    return peft.get_peft_model(base, config)


def their_logits(model):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in IDS])


def our_logits(directory, adapter):
    cfg = load_model_config(directory)
    lora, tensors = load_adapter(adapter, cfg)
    compute = Compute(
        cfg, torch.float32, lora_scaling=lora.scaling, lora_ratios=scaling_ratios(lora, cfg)
    )
    with torch.no_grad():
        frozen = load_file(directory / "model.safetensors")
        frozen[TOKEN_IDS] = torch.tensor(lora.trainable_token_indices)
        return logits(tensors, frozen, make_tokens(IDS), compute)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_loads_what_a_run_wrote_and_gives_its_logits(place, tmp_path, name):
    """The file has PEFT's own keys, shapes and settings; training moved every tensor."""
    model, (ours, settings) = place / "model", VARIANTS[name]
    train(
        model=model, dataset=place / "rows.jsonl", output_dir=tmp_path / "out", max_steps=3,
        learning_rate=1e-2, load_in_4bit=False, target_modules=TARGETS, save_merged=True,
        **COMMON, **ours,
    )  # fmt: skip
    loaded = theirs(model, tmp_path / "out")
    assert (their_logits(loaded) - our_logits(model, tmp_path / "out")).abs().max() < 2e-5
    fresh = theirs(model, **settings)
    fresh.save_pretrained(tmp_path / "peft")
    mine, other = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("out", "peft"))
    shapes, wanted = ({k: t.shape for k, t in tensors.items()} for tensors in (mine, other))
    assert shapes == wanted
    moved = [k for k, t in mine.items() if "lora_B" in k and t.any()]
    assert len(moved) == len([k for k in mine if "lora_B" in k])
    a, b = (read(tmp_path / d / "adapter_config.json") for d in ("out", "peft"))
    assert a.keys() == b.keys()
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "use_rslora",
                "init_lora_weights", "exclude_modules", "trainable_token_indices"):  # fmt: skip
        mine, other = (c[key] for c in (a, b))
        if key == "exclude_modules" and isinstance(other, list):  # a set, in any order
            mine, other = sorted(mine), sorted(other)
        assert mine == other, key
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "merged", dtype=torch.float32
    )
    assert (their_logits(merged) - their_logits(loaded)).abs().max() < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_we_read_what_peft_wrote(place, tmp_path, name):
    """Random B and magnitudes, so that every part counts."""
    model = theirs(place / "model", **VARIANTS[name][1])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if "trainable_tokens" in parameter_name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if "magnitude" in parameter_name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    want = their_logits(model.eval())
    assert (our_logits(place / "model", tmp_path) - want).abs().max() < 2e-5
    plain = their_logits(theirs(place / "model"))
    assert (want - plain).abs().max() > 0.05


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("in_dict", [False, True])
def test_token_rows_are_peft_s_tied_and_untied(tmp_path, tied, in_dict):
    """A tied head follows its embedding's rows; merged, and in generation, they count too."""
    model = write_model(tmp_path / "model", tie_word_embeddings=tied)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(12))
    tokens = sorted({t for row in IDS for t in row})[1:4]
    train(
        model=model, dataset=rows, output_dir=tmp_path / "out", max_steps=4, learning_rate=1e-2,
        load_in_4bit=False, trainable_token_indices=tokens, save_merged=True, optim="adamw_8bit",
        **COMMON,
    )  # fmt: skip
    if in_dict:
        config = read(tmp_path / "out" / "adapter_config.json")
        config["trainable_token_indices"] = {"embed_tokens": tokens}
        path = tmp_path / "out" / "adapter_model.safetensors"
        save_file(load_file(path), path, {"format": "pt"})  # without our digest, as PEFT writes
        (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    want = their_logits(theirs(model, tmp_path / "out"))
    assert (our_logits(model, tmp_path / "out") - want).abs().max() < 2e-5
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "merged", dtype=torch.float32
    )
    assert (their_logits(merged) - want).abs().max() < 1e-4
    old = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    new = load_file(tmp_path / "out" / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    changed = (old != new).any(1).nonzero().squeeze(1).tolist()
    assert set(changed) <= set(tokens) and (changed == tokens if tied else True)
    moments = load_file(tmp_path / "out" / "checkpoint-4" / "optimizer.safetensors")
    assert torch.float32 in {t.dtype for n, t in moments.items() if n.startswith("exp_avg.1")}
    cut = {"prompt": "a", "max_new_tokens": 4}
    answers = [
        call("generate", flags(**cut, **source)).out
        for source in ({"adapter": tmp_path / "out"}, {"model": tmp_path / "out" / "merged"})
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_embedding_is_peft_s_both_ways(tmp_path, tied):
    """A tied head stays the base's; merged, the two part."""
    model = write_model(tmp_path / "model", tie_word_embeddings=tied)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(12))
    out = tmp_path / "out"
    train(
        model=model, dataset=rows, output_dir=out, max_steps=4, learning_rate=1e-2,
        load_in_4bit=False, target_modules=TARGETS, lora_embeddings=True, save_merged=True,
        rank_pattern=["embed_tokens=3"], **COMMON,
    )  # fmt: skip
    loaded = theirs(model, out)
    want = their_logits(loaded)
    assert (our_logits(model, out) - want).abs().max() < 2e-5
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert (their_logits(merged) - want).abs().max() < 1e-4
    weights = load_file(out / "merged" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    assert not torch.equal(weights["lm_head.weight"], embedding)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[*TARGETS, "embed_tokens"], task_type="CAUSAL_LM",
        rank_pattern={"embed_tokens": 3},
    )  # fmt: skip
    fresh = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_embedding" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it saves the whole embedding too
        fresh.save_pretrained(tmp_path / "peft")
    with pytest.warns(UserWarning, match="PEFT's copy of the base's embedding; ignored"):
        ours = our_logits(model, tmp_path / "peft")
    assert (ours - their_logits(fresh.eval())).abs().max() < 2e-5
    shapes = [
        {k: t.shape for k, t in load_file(d / "adapter_model.safetensors").items()}
        for d in (out, tmp_path / "peft")
    ]
    extra = {k for k in shapes[1] if k.endswith("base_layer.weight")}
    assert len(extra) >= 1
    assert shapes[0] == {k: v for k, v in shapes[1].items() if k not in extra}
    answers = [
        call("generate", flags(prompt="a", max_new_tokens=4, **source)).out
        for source in ({"adapter": out}, {"model": out / "merged"})
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_token_rows_are_those_of_the_whole_embedding(tied):
    """Rows of the gradient that training every row would give."""
    cfg = ModelConfig(**{**vars(CFG), "tie_word_embeddings": tied})
    ids = (5, 40, 3)
    lora = LoraConfig(r=2, trainable_token_indices=ids)
    whole = LoraConfig(r=2, modules_to_save=("embed_tokens",))
    weights = random_weights(cfg)
    batch = all_rows(random_dataset([[20], [30], [9, 9]]))
    grads = {}
    for name, chosen in (("rows", lora), ("whole", whole)):
        flat = allocate(trainable_shapes(chosen, cfg), torch.device("cpu"))
        init_lora_(flat, 0)
        frozen = {n: w for n, w in weights.items() if n not in flat.views}
        for key, view in flat.views.items():
            if key == TOKEN_ROWS:
                frozen[TOKEN_IDS] = torch.tensor(ids)
                view.copy_(weights["model.embed_tokens.weight"][list(ids)])
            elif key == "model.embed_tokens.weight":
                view.copy_(weights[key])
        _, grad = loss_and_grads(flat, frozen, batch, ExecutionPlan(Compute(cfg, lora_scaling=1.0)))
        sizes = [v.numel() for v in flat.views.values()]
        parts = dict(zip(flat.views, grad.split(sizes), strict=True))
        grads[name] = parts[TOKEN_ROWS if name == "rows" else "model.embed_tokens.weight"]
    wanted = grads["whole"].view(cfg.vocab_size, -1)[list(ids)]
    assert (
        torch.allclose(grads["rows"].view(3, -1), wanted, atol=1e-7) and wanted.abs().max() > 1e-4
    )


def test_dora_starts_as_the_base_and_trains_its_magnitudes(place, tmp_path):
    settings = {"model": place / "model", "dataset": place / "rows.jsonl", "max_steps": 2}
    settings |= {"target_modules": TARGETS, "learning_rate": 1e-2, **COMMON}
    rows = {"eval_dataset": place / "rows.jsonl"}
    train(**settings, **rows, use_dora=True, output_dir=tmp_path / "dora", load_in_4bit=True)
    train(**settings, **rows, output_dir=tmp_path / "plain", load_in_4bit=True)
    first = [json.loads((tmp_path / d / "step0.json").read_text()) for d in ("dora", "plain")]
    assert first[0]["eval_loss"] == pytest.approx(first[1]["eval_loss"], abs=1e-5)
    tensors = load_file(tmp_path / "dora" / "adapter_model.safetensors")
    weights = load_file(place / "model" / "model.safetensors")
    for key, magnitude in tensors.items():
        if key.endswith("lora_magnitude_vector"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            length = weights[f"{path}.weight"].norm(dim=1)
            assert 1e-3 < (magnitude / length - 1).abs().max() < 0.2


def test_dora_with_dropout_is_peft_s_formula(place):
    """The same entries are dropped for the base's change and for the adapter."""
    from minisft.nn import Linear, Lora, LoraContext, dropout, linear

    generator = torch.Generator().manual_seed(0)
    x, W, A, B, m = (
        torch.randn(shape, generator=generator) for shape in ((5, 8), (6, 8), (2, 8), (6, 2), (6,))
    )
    keys, s = torch.arange(5) * 77, 1.5
    y = linear(x, Linear(W, None, Lora(A, B, 3, m)), LoraContext(s, 0.5, keys))
    dropped = dropout(x, keys, 3, 0.5)
    ratio = m / (W + s * B @ A).norm(dim=1)
    want = x @ W.T + (ratio - 1) * (dropped @ W.T) + ratio * s * (dropped @ A.T @ B.T)
    assert torch.allclose(y, want, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_gaussian_draws_have_the_deviation_that_peft_s_have(place, tied):
    cfg = load_model_config(place / "model")
    flat = allocate(trainable_shapes(LoraConfig(r=8), cfg), torch.device("cpu"))
    init_lora_(flat, 0, "gaussian")
    A = torch.cat([v.flatten() for n, v in flat.views.items() if n.endswith("lora_A.weight")])
    assert A.std().item() == pytest.approx(1 / 8, rel=0.05) and abs(A.mean()) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": "q_proj"}, "expected MODULE=a whole number above 0"),
        ({"rank_pattern": "q_proj=2.5"}, "expected MODULE=a whole number above 0"),
        ({"alpha_pattern": "q_proj=x"}, "expected MODULE=a number above 0"),
        ({"alpha_pattern": "q_(=3"}, "is not a regular expression"),
        ({"layers_to_transform": "one"}, "expected numbers of layers"),
        ({"trainable_token_indices": "3 x"}, "expected token ids, from 0"),
        ({"trainable_token_indices": [3, 3]}, "expected each once"),
        ({"init_lora_weights": "pissa_niter_x"}, "expected one of default, gaussian, pissa"),
        ({"init_lora_weights": "zeros"}, "expected one of default, gaussian"),
        ({"use_dora": True, "full_finetuning": True}, "--use-dora has no effect with --full"),
    ],
)
def test_malformed_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": (3, 999)}, "names token 999, but the embedding has 384 rows"),
        (
            {"trainable_token_indices": (3,), "modules_to_save": ("embed_tokens",)},
            "where the whole embedding is trained",
        ),
        (
            {"lora_embeddings": True, "modules_to_save": ("embed_tokens",)},
            "does not go with modules_to_save",
        ),
        (
            {"lora_embeddings": True, "use_dora": True},
            "--lora-embeddings does not go with use_dora",
        ),
        (
            {"lora_embeddings": True, "target_modules": ("re:.*q_proj",)},
            "does not go with a target_modules pattern",
        ),
        ({"layers_to_transform": (0, 7)}, "names layer 7, but the model has 2"),
        ({"layers_to_transform": (0,), "target_modules": ("re:.*q_proj",)}, "drop one"),
        ({"layers_to_transform": (0,), "target_modules": ("1.mlp.up_proj",)}, "leaves none"),
        (
            {"exclude_modules": ("k_porj",)},
            "--exclude-modules k_porj matches none of the 14 target modules",
        ),
        ({"exclude_modules": ("re:.*",)}, "matches all of the 14 target modules"),
        ({"exclude_modules": ("re:(",)}, "is not a regular expression"),
        (
            {"rank_pattern": (("q_porj", 2),)},
            "--rank-pattern names 'q_porj', which matches no adapted module",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_told(place, settings, message):
    cfg = load_model_config(place / "model")
    with pytest.raises(UserError, match=message):
        check_patterns(LoraConfig(**settings), cfg)
        adapter_shapes(LoraConfig(**settings), cfg)


def test_layers_are_those_asked_for(place):
    lora = LoraConfig(layers_to_transform=(1,), target_modules=("all-linear",))
    found = match_targets(lora, load_model_config(place / "model"))
    assert len(found) == 7 and all(path.startswith("model.layers.1.") for path in found)


def test_vllm_is_warned_of(place, tmp_path):
    settings = {"model": place / "model", "dataset": place / "rows.jsonl", "max_steps": 1}
    settings |= {"use_dora": True, "rank_pattern": {"q_proj": 2}, "output_dir": tmp_path}
    out = train(**{k: [f"{a}={b}" for a, b in v.items()] if isinstance(v, dict) else v
                   for k, v in settings.items()}).out  # fmt: skip
    assert "vLLM cannot load this adapter as it is (DoRA is not supported)" in out
    assert "(rank_pattern is ignored" in out
    assert len(vllm_problems(read(tmp_path / "adapter_config.json"))) == 2
    answer = call("generate", flags(adapter=tmp_path, prompt="a", max_new_tokens=2))
    assert answer.code == 0, answer.err
