"""Adapters against PEFT and transformers: theirs load here, ours load there, the logits agree.

The judge is an explicit merge into plain weights (`merged_logits`), which knows neither side's
LoRA code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.hf import parse_model_config
from minisft.config.lora import LoraConfig
from minisft.config.model import LINEAR_NAMES, ModelConfig
from minisft.config.targets import adapter_shapes
from minisft.files.adapter import load_adapter, save_adapter
from minisft.files.adapter_config import read_adapter_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # transformers' own use of a name that it deprecated.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
TOKENS_BT = torch.arange(22).reshape(2, 11) * 7 % 96

# name -> (the adapter, is the base tied)
Kind = tuple[LoraConfig, bool]


def _kind(tied: bool = False, **fields: Any) -> Kind:
    plain = {"r": 4, "lora_alpha": 16, "target_modules": ("q_proj", "v_proj")}
    return LoraConfig(**plain | fields), tied


KINDS: dict[str, Kind] = {
    "plain": _kind(),
    "seven suffixes": _kind(target_modules=LINEAR_NAMES),
    "one layer": _kind(target_modules=("1.self_attn.k_proj", "model.layers.0.mlp.up_proj")),
    "pattern": _kind(target_modules=(r"re:.*\.(0|1)\.mlp\.(up|down)_proj",)),
    "rslora": _kind(use_rslora=True, lora_alpha=6),
    "dropout": _kind(lora_dropout=0.25),
    "plain on tied": _kind(tied=True),
    "embed": _kind(modules_to_save=("embed_tokens",)),
    "head": _kind(modules_to_save=("lm_head",)),
    "both": _kind(modules_to_save=("embed_tokens", "lm_head")),
    "tied embed": _kind(tied=True, modules_to_save=("embed_tokens",)),
    "tied head": _kind(tied=True, modules_to_save=("lm_head",)),
    "tied both": _kind(tied=True, modules_to_save=("embed_tokens", "lm_head")),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def peft_fields(kind: Kind) -> dict[str, Any]:
    """The same adapter in PEFT's words. Fresh lists: PEFT writes into those it is given."""
    lora, tied = kind
    targets = list(lora.target_modules)
    is_pattern = targets[0].startswith("re:")
    plain = {k: v for k, v in dataclasses.asdict(lora).items() if k != "lora_embeddings"}
    return plain | {
        "target_modules": targets[0].removeprefix("re:") if is_pattern else targets,
        "modules_to_save": list(lora.modules_to_save) or None,
        "ensure_weight_tying": tied and bool(lora.modules_to_save),
        "init_lora_weights": True,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "layers_to_transform": list(lora.layers_to_transform) or None,
        "exclude_modules": list(lora.exclude_modules) or None,
        "trainable_token_indices": list(lora.trainable_token_indices) or None,
    }


def base_model(tied: bool, layers: int = 2) -> Any:
    """A tiny random Llama of transformers, fp32, no two sizes equal; the same one every time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def model_config(model: Any) -> ModelConfig:
    return parse_model_config(model.config.to_dict())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only get slower when they are shared out."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(scope="module")
def base_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    directories = {}
    for tied in (False, True):
        directories[tied] = tmp_path_factory.mktemp("base") / ("tied" if tied else "untied")
        base_model(tied).save_pretrained(directories[tied])
    return directories


def random_tensors(lora: LoraConfig, cfg: ModelConfig) -> dict[str, Tensor]:
    """A trained-looking adapter: B is not zero, and copies are far from the base."""
    generator = torch.Generator().manual_seed(1)
    shapes = adapter_shapes(lora, cfg)
    return {name: torch.randn(shape, generator=generator) / 5 for name, shape in shapes.items()}


@torch.no_grad()
def merged_logits(base: Any, tensors: dict[str, Tensor], lora: LoraConfig) -> Tensor:
    """Logits [B, T, V] float64 of the base with W + scaling * B @ A in place of each adapted W.

    The reference for every equal-logits test: plain transformers modules, no LoRA code, and in
    double precision, so that only a real difference shows. Changes `base` in place.
    """
    weights = dict(base.double().named_parameters())
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            scaling = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
            delta = tensors[f"{path}.lora_B.weight"].double() @ tensor.double()
            weights[f"{path}.weight"] += scaling * delta
        elif not name.endswith(".lora_B.weight"):
            weights[name].copy_(tensor)
    return base(TOKENS_BT).logits


@torch.no_grad()
def double_logits(model: Any) -> Tensor:
    """Logits [B, T, V] float64 of a model whose stored numbers are float32."""
    return model.eval().double()(TOKENS_BT).logits


def assert_same_and_not_base(got: Tensor, expected: Tensor, base: Any) -> None:
    assert got.dtype is torch.float64
    # Usually 0.0: the float32 inside transformers' norms rounds the double noise (1e-14) away. One
    # wrong element by 1e-5 shows as 1e-4.
    assert (got - expected).abs().max() < 1e-5
    assert (got - double_logits(base)).abs().max() > 0.1


def random_peft_model(model: Any, **fields: Any) -> Any:
    """PEFT's own model with every trainable parameter random."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) / 5
                parameter.copy_(values.to(parameter.dtype))
    return wrapped


# ------------------------------------------------------------------------------- ours, read by PEFT


@every_kind
def test_peft_and_transformers_load_ours(
    kind: Kind, base_dirs: dict[bool, Path], tmp_path: Path
) -> None:
    lora, tied = kind
    cfg = model_config(base_model(tied))
    tensors = random_tensors(lora, cfg)
    save_adapter(tmp_path, tensors, lora, cfg, str(base_dirs[tied]))
    expected = merged_logits(base_model(tied), tensors, lora)
    by_peft = peft.PeftModel.from_pretrained(base_model(tied), tmp_path)
    assert_same_and_not_base(double_logits(by_peft), expected, base_model(tied))
    by_name = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_and_not_base(double_logits(by_name), expected, base_model(tied))


@every_kind
def test_layout_equals_what_peft_writes(kind: Kind, tmp_path: Path) -> None:
    lora, tied = kind
    cfg = model_config(base_model(tied))
    save_adapter(tmp_path / "ours", random_tensors(lora, cfg), lora, cfg, "org/base")
    random_peft_model(base_model(tied), **peft_fields(kind)).save_pretrained(tmp_path / "theirs")
    layouts, configs = [], []
    for side in ("ours", "theirs"):
        stored = safetensors.torch.load_file(tmp_path / side / "adapter_model.safetensors")
        layouts.append({key: (tuple(t.shape), t.dtype) for key, t in stored.items()})
        config = json.loads((tmp_path / side / "adapter_config.json").read_text())
        for field in ("target_modules", "modules_to_save"):
            if isinstance(config[field], list):
                config[field] = set(config[field])
        configs.append(config)
    assert layouts[0] == layouts[1]
    if tied and lora.modules_to_save:
        # PEFT renames to the path of the module that it tied; it does so again when it loads ours.
        assert "model.embed_tokens" in configs[1].pop("modules_to_save")
        assert configs[0].pop("modules_to_save") == set(lora.modules_to_save)
    assert configs[0] == configs[1] | {"base_model_name_or_path": "org/base"}


@every_kind
def test_peft_parses_our_config_to_its_own(kind: Kind, tmp_path: Path) -> None:
    lora, tied = kind
    cfg = model_config(base_model(tied))
    save_adapter(tmp_path, random_tensors(lora, cfg), lora, cfg, "org/base", revision="v1")
    parsed = peft.LoraConfig.from_pretrained(tmp_path)
    intended = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/base",
        revision="v1",
        inference_mode=True,
        **peft_fields(kind),
    )
    assert parsed.to_dict() == intended.to_dict()


# ------------------------------------------------------------------------------- PEFT's, read by us


@every_kind
def test_theirs_loads_here(kind: Kind, tmp_path: Path) -> None:
    lora, tied = kind
    model = random_peft_model(base_model(tied), **peft_fields(kind))
    model.save_pretrained(tmp_path)
    cfg = model_config(base_model(tied))
    got_lora, tensors = load_adapter(tmp_path, cfg)
    assert got_lora.scaling == lora.scaling
    assert adapter_shapes(got_lora, cfg).keys() == tensors.keys()
    assert tensors.keys() == adapter_shapes(lora, cfg).keys()
    merged = merged_logits(base_model(tied), tensors, got_lora)
    assert_same_and_not_base(double_logits(model), merged, base_model(tied))


@pytest.mark.parametrize("layers", [2, 5])
def test_theirs_with_all_linear_loads_here(layers: int, tmp_path: Path) -> None:
    """PEFT writes fourteen full paths for two layers, seven suffixes for five."""
    model = random_peft_model(base_model(False, layers), r=4, target_modules="all-linear")
    model.save_pretrained(tmp_path)
    assert len(read_adapter_config(tmp_path)["target_modules"]) == {2: 14, 5: 7}[layers]
    lora, tensors = load_adapter(tmp_path, model_config(base_model(False, layers)))
    assert len(tensors) == 14 * layers
    merged = merged_logits(base_model(False, layers), tensors, lora)
    assert_same_and_not_base(double_logits(model), merged, base_model(False, layers))


def test_theirs_in_bfloat16_loads_here(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        base_model(False).bfloat16(),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="gaussian"),
        autocast_adapter_dtype=False,
    )
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    _, tensors = load_adapter(tmp_path, model_config(base_model(False)))
    for name, tensor in tensors.items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, stored[f"base_model.model.{name}"].float())


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_theirs_with_embedding_and_head_gone_apart_is_refused(
    saved: list[str], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the two matrices come apart
        model = random_peft_model(
            base_model(True), target_modules=["q_proj"], modules_to_save=saved
        )
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ensure_weight_tying"):
        load_adapter(tmp_path, model_config(base_model(True)))


VARIANTS = {
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("field", VARIANTS)
def test_their_variants_are_refused_by_name(field: str, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj"]
    with warnings.catch_warnings():
        if field == "lora_bias":  # PEFT warns of merging, and takes the bias for a broken tensor
            warnings.simplefilter("ignore")
        model = random_peft_model(base_model(False), r=4, target_modules=targets, **VARIANTS[field])
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"adapter_config\.json: {field} is "):
        load_adapter(tmp_path, model_config(base_model(False)))
