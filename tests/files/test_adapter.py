"""Adapters on disk: what is written, what is read back, and which damage is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.model import LINEAR_NAMES, ModelConfig
from minisft.config.targets import adapter_shapes
from minisft.files.adapter import load_adapter, save_adapter
from minisft.files.adapter_config import adapter_config_dict, read_adapter_config
from minisft.files.export import model_card
from minisft.files.safetensors import read_header

# No two sizes are equal, so that no transposed or misplaced tensor fits by accident.
CFG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
)
TIED = dataclasses.replace(CFG, tie_word_embeddings=True)
PLAIN = LoraConfig(r=4, lora_alpha=16, target_modules=("q_proj", "v_proj"))
PREFIX = "base_model.model."
Q0 = PREFIX + "model.layers.0.self_attn.q_proj"
V1 = PREFIX + "model.layers.1.self_attn.v_proj"
EMBED, HEAD = PREFIX + "model.embed_tokens.weight", PREFIX + "lm_head.weight"


def random_tensors(lora: LoraConfig, cfg: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(lora, cfg)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(directory: Path, lora: LoraConfig = PLAIN, cfg: ModelConfig = CFG) -> dict[str, Tensor]:
    tensors = random_tensors(lora, cfg)
    save_adapter(directory, tensors, lora, cfg, "org/base")
    return tensors


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(
    directory: Path, change: Callable[[dict[str, Tensor]], object], keep_digest: bool = True
) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    metadata = read_header(path).metadata if keep_digest else {"format": "pt"}
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for key in [key for key in tensors if re.search(old, key)]:
        tensors[re.sub(old, new, key)] = tensors.pop(key)


def refusal(directory: Path, cfg: ModelConfig = CFG) -> str:
    with pytest.raises(UserError) as caught:
        load_adapter(directory, cfg)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(directory))
    return message


def assert_loads(
    directory: Path, tensors: dict[str, Tensor], lora: LoraConfig = PLAIN, cfg: ModelConfig = CFG
) -> None:
    got_lora, got = load_adapter(directory, cfg)
    assert got_lora == lora
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    assert all(tensor.dtype is torch.float32 for tensor in got.values())


# ------------------------------------------------------------------------------ writing, round trip


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "lora",
    [
        PLAIN,
        dataclasses.replace(PLAIN, use_rslora=True, lora_alpha=12.5, lora_dropout=0.1),
        dataclasses.replace(PLAIN, target_modules=(r"re:.*\.(q|up)_proj",)),
        dataclasses.replace(PLAIN, target_modules=("0.mlp.up_proj", "model.layers.1.mlp.up_proj")),
        dataclasses.replace(PLAIN, modules_to_save=("embed_tokens",)),
        dataclasses.replace(PLAIN, modules_to_save=("lm_head",)),
        dataclasses.replace(PLAIN, modules_to_save=("embed_tokens", "lm_head")),
    ],
    ids=["plain", "rslora", "pattern", "layers", "embed", "head", "both"],
)
def test_round_trip(tmp_path: Path, lora: LoraConfig, cfg: ModelConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = write(tmp_path, lora, cfg)
        assert_loads(tmp_path, tensors, lora, cfg)


def test_all_linear_is_written_as_the_seven_names(tmp_path: Path) -> None:
    tensors = write(tmp_path, dataclasses.replace(PLAIN, target_modules=("all-linear",)))
    assert read_adapter_config(tmp_path)["target_modules"] == list(LINEAR_NAMES)
    assert_loads(tmp_path, tensors, dataclasses.replace(PLAIN, target_modules=LINEAR_NAMES))


def test_an_embedding_among_the_targets_is_a_trained_copy(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, target_modules=("q_proj", "lm_head")))
    config = read_adapter_config(tmp_path)
    assert (config["target_modules"], config["modules_to_save"]) == (["q_proj"], ["lm_head"])


def test_the_files_and_their_form(tmp_path: Path) -> None:
    lora, tensors = PLAIN, random_tensors(PLAIN, CFG)
    directory = tmp_path / "a" / "b"
    save_adapter(directory, tensors, lora, CFG, "org/base", revision="v1")
    assert sorted(os.listdir(directory)) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (directory / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")
    header = read_header(directory / "adapter_model.safetensors")
    assert header.tensors.keys() == {PREFIX + name for name in tensors}
    assert {info.dtype for info in header.tensors.values()} == {torch.float32}
    assert header.metadata.keys() == {"format", "minisft_digest", "minisft_load_in_4bit"}
    assert header.metadata["format"] == "pt"
    assert re.fullmatch("[0-9a-f]{64}", header.metadata["minisft_digest"])


def test_one_tied_copy_is_written_under_both_keys(tmp_path: Path) -> None:
    for name in ("embed_tokens", "lm_head"):
        tensors = write(tmp_path, dataclasses.replace(PLAIN, modules_to_save=(name,)), TIED)
        stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        assert torch.equal(stored[EMBED], tensors["model.embed_tokens.weight"])
        assert torch.equal(stored[HEAD], tensors["model.embed_tokens.weight"])
        assert read_adapter_config(tmp_path)["ensure_weight_tying"] is True


@pytest.mark.parametrize(
    ("cfg", "saved", "expected"),
    [(TIED, ("lm_head",), True), (TIED, (), False), (CFG, ("lm_head",), False)],
)
def test_tying_is_asked_for_only_where_it_means_something(
    cfg: ModelConfig, saved: tuple[str, ...], expected: bool
) -> None:
    lora = dataclasses.replace(PLAIN, modules_to_save=saved)
    config = adapter_config_dict(lora, cfg, "org/base")
    assert config["ensure_weight_tying"] is expected


def test_a_whole_alpha_is_written_as_an_integer() -> None:
    for alpha, expected in ((16.0, int), (12.5, float)):
        lora = dataclasses.replace(PLAIN, lora_alpha=alpha)
        config = adapter_config_dict(lora, CFG, "org/base")
        assert type(config["lora_alpha"]) is expected


def test_training_tensors_of_any_kind_can_be_written(tmp_path: Path) -> None:
    """Views of one buffer, transposed, half precision, requiring gradients."""
    shapes = adapter_shapes(PLAIN, CFG)
    buffer = torch.randn(max(a * b for a, b in shapes.values())).bfloat16()
    tensors = {n: buffer[: a * b].view(b, a).t().requires_grad_() for n, (a, b) in shapes.items()}
    save_adapter(tmp_path, tensors, PLAIN, CFG, "org/base")
    assert_loads(tmp_path, {name: t.detach().float() for name, t in tensors.items()})
    header = read_header(tmp_path / "adapter_model.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {torch.float32}


def test_tensors_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    tensors = random_tensors(PLAIN, CFG)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    for wrong in (tensors | {name: torch.zeros(64, 4)}, tensors | {"x": torch.zeros(1)}):
        with pytest.raises(ValueError, match=rf"{name}|x is"):
            save_adapter(tmp_path, wrong, PLAIN, CFG, "org/base")
    assert os.listdir(tmp_path) == []


def test_an_empty_base_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base_model_name_or_path is empty"):
        save_adapter(tmp_path, random_tensors(PLAIN, CFG), PLAIN, CFG, "")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(File exists"):
        save_adapter(tmp_path / "file", random_tensors(PLAIN, CFG), PLAIN, CFG, "org/base")


def test_a_failed_config_write_is_refused_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    before, real = (tmp_path / "adapter_config.json").read_bytes(), os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "adapter_config.json":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be written"):
        write(tmp_path, dataclasses.replace(PLAIN, lora_alpha=32))
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert len(os.listdir(tmp_path)) == 2
    # New weights with the old config: the digest detects it.
    assert "was changed after training" in refusal(tmp_path)


def test_the_default_layout_obeys_vllm(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, r=8, target_modules=("all-linear",)))
    config = read_adapter_config(tmp_path)
    assert type(config["r"]) is int and type(config["lora_alpha"]) is int
    assert isinstance(config["target_modules"], list)
    assert (config["bias"], config["use_dora"]) == ("none", False)
    assert config["modules_to_save"] is None and config["rank_pattern"] == {}
    shape = rf"base_model\.model\.model\.layers\.\d+\.\w+\.({'|'.join(LINEAR_NAMES)})"
    for key in read_header(tmp_path / "adapter_model.safetensors").tensors:
        assert re.fullmatch(shape + r"\.lora_[AB]\.weight", key)


# ------------------------------------------------------------------- the eleven defects of the wild


def test_defect_one_tensor_missing(tmp_path: Path) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop(f"{V1}.lora_B.weight"))
    assert f"{V1}.lora_B.weight' is missing" in refusal(tmp_path)


def test_defect_one_layer_missing(tmp_path: Path) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: [t.pop(f"{V1}.lora_{x}.weight") for x in "AB"])
    assert f"{V1}.lora_A.weight' is missing (2 in all)" in refusal(tmp_path)


@pytest.mark.parametrize("which", ["", "q_proj", "lora_B", "layers.1"])
def test_defect_prefix_dropped(tmp_path: Path, which: str) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: rename(t, rf"^{PREFIX}(.*{which})", r"\1"))
    assert f"lacks the prefix {PREFIX!r}" in refusal(tmp_path)


def test_defect_part_of_the_prefix_dropped(tmp_path: Path) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: rename(t, rf"^{PREFIX}model\.", PREFIX))
    assert "not a linear of this model" in refusal(tmp_path)


@pytest.mark.parametrize("others", [{}, {"x": torch.zeros(2)}])
def test_defect_no_adapter_tensors(tmp_path: Path, others: dict[str, Tensor]) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: (t.clear(), t.update(others)))
    assert "holds no adapter tensors" in refusal(tmp_path)


@pytest.mark.parametrize("extra", ["up_proj", "w1", "lm_head"])
def test_defect_extra_target_is_harmless(tmp_path: Path, extra: str) -> None:
    tensors = write(tmp_path)
    edit_config(tmp_path, target_modules=["q_proj", extra, "v_proj"])
    with pytest.warns(UserWarning, match=f"names {extra!r}, for which the file has no"):
        assert_loads(tmp_path, tensors)


def test_defect_default_left_in_names_is_harmless(tmp_path: Path) -> None:
    lora = dataclasses.replace(PLAIN, modules_to_save=("lm_head",))
    tensors = write(tmp_path, lora)
    edit_tensors(tmp_path, lambda t: rename(t, r"(lora_[AB])\.weight", r"\1.default.weight"))
    edit_tensors(tmp_path, lambda t: rename(t, r"lm_head\.", "lm_head.modules_to_save.default."))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_loads(tmp_path, tensors, lora)


def test_defect_extra_unknown_tensor_is_harmless(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({PREFIX + "vision.weight": torch.ones(2)}))
    with pytest.warns(UserWarning, match=r"vision\.weight' has no known meaning"):
        assert_loads(tmp_path, tensors)


@pytest.mark.parametrize("changes", [{"lora_alpha": 32}, {"use_rslora": True}])
def test_defect_scaling_changed(tmp_path: Path, changes: dict) -> None:
    write(tmp_path)
    edit_config(tmp_path, **changes)
    key, value = next(iter(changes.items()))
    message = refusal(tmp_path)
    assert "adapter_config.json was changed after training" in message
    assert f"{key}={value}" in message


def test_defect_targets_lack_a_trained_module(tmp_path: Path) -> None:
    write(tmp_path)
    edit_config(tmp_path, target_modules=["q_proj"])
    message = refusal(tmp_path)
    assert "does not cover 'model.layers.0.self_attn.v_proj'" in message
    assert "Add 'v_proj'" in message


@pytest.mark.parametrize("r", [8, 2])
def test_defect_wrong_r(tmp_path: Path, r: int) -> None:
    write(tmp_path)
    edit_config(tmp_path, r=r)
    assert f"Its rank is 4, adapter_config.json says r={r}" in refusal(tmp_path)


def test_defect_wrong_r_of_one_tensor(tmp_path: Path) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"{V1}.lora_B.weight": torch.ones(40, 5)}))
    message = refusal(tmp_path)
    assert f"{V1}.lora_B.weight' is [40, 5], expected [40, 4]. Its rank is 5" in message


def test_defect_transposed(tmp_path: Path) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({k: v.t().contiguous() for k, v in t.items()}))
    assert "is [64, 4], expected [4, 64]. It is transposed" in refusal(tmp_path)


def test_defect_a_and_b_exchanged(tmp_path: Path) -> None:
    write(tmp_path)

    def exchange(tensors: dict[str, Tensor]) -> None:
        rename(tensors, "lora_A", "lora_C")
        rename(tensors, "lora_B", "lora_A")
        rename(tensors, "lora_C", "lora_B")

    edit_tensors(tmp_path, exchange)
    assert "lora_A.weight' is [80, 4], expected [4, 64]" in refusal(tmp_path)


# ------------------------------------------------------------------------------- further refusals


def test_weights_without_a_digest_load_with_any_alpha(tmp_path: Path) -> None:
    """PEFT's own files carry no digest: nothing in them could betray the change."""
    tensors = write(tmp_path)
    edit_tensors(tmp_path, lambda t: None, keep_digest=False)
    edit_config(tmp_path, lora_alpha=32)
    assert_loads(tmp_path, tensors, dataclasses.replace(PLAIN, lora_alpha=32))


def test_digest_ignores_order_and_what_has_no_effect(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    edit_config(tmp_path, target_modules=["v_proj", "q_proj"], lora_alpha=16.0, revision="x")
    edit_config(tmp_path, base_model_name_or_path="moved/base", peft_version="0.22.0")
    lora = dataclasses.replace(PLAIN, target_modules=("v_proj", "q_proj"))
    assert_loads(tmp_path, tensors, lora)


def test_digest_covers_the_pattern(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, target_modules=(r"re:.*\.(q|v)_proj",)))
    edit_config(tmp_path, target_modules=["q_proj", "v_proj"])
    assert "was changed after training" in refusal(tmp_path)


def test_a_trained_copy_that_is_missing(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, modules_to_save=("lm_head",)))
    edit_tensors(tmp_path, lambda t: t.pop(HEAD))
    assert f"{HEAD}' is missing" in refusal(tmp_path)


def test_a_trained_copy_that_is_not_declared(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, modules_to_save=("lm_head",)))
    edit_config(tmp_path, modules_to_save=None)
    assert f"{HEAD}' replaces a weight of the base model" in refusal(tmp_path)


@pytest.mark.parametrize("key", [HEAD, EMBED])
def test_a_tied_copy_needs_both_keys(tmp_path: Path, key: str) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, modules_to_save=("lm_head",)), TIED)
    edit_tensors(tmp_path, lambda t: t.pop(key))
    assert f"{key}' is missing" in refusal(tmp_path, TIED)


def test_tied_copies_that_differ(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, modules_to_save=("lm_head",)), TIED)
    edit_tensors(tmp_path, lambda t: t[HEAD].add_(1))
    assert "differ, but this base ties them" in refusal(tmp_path, TIED)


def test_an_untied_copy_on_a_tied_base(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(PLAIN, modules_to_save=("embed_tokens",)), TIED)
    edit_config(tmp_path, ensure_weight_tying=False)
    edit_tensors(tmp_path, lambda t: t.pop(HEAD))
    assert "with ensure_weight_tying false on a tied base" in refusal(tmp_path, TIED)


def test_an_adapter_of_another_size(tmp_path: Path) -> None:
    write(tmp_path)
    longer = dataclasses.replace(CFG, num_hidden_layers=3)
    wider = dataclasses.replace(CFG, hidden_size=128)
    assert "layers.2.self_attn.q_proj.lora_A.weight' is missing" in refusal(tmp_path, longer)
    assert "is [4, 64], expected [4, 128]. Was the adapter" in refusal(tmp_path, wider)
    shorter = dataclasses.replace(CFG, num_hidden_layers=1)
    assert "not a linear of this model (1 layers)" in refusal(tmp_path, shorter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: t[f"{V1}.lora_B.weight"].view(-1)[-1].fill_(value))
    assert f"{V1}.lora_B.weight' holds NaN or infinite" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = write(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    assert_loads(tmp_path, {name: t.to(dtype).float() for name, t in tensors.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 64).to(dtype)}))
    assert f"{Q0}.lora_A.weight' is {dtype}" in refusal(tmp_path)


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    _, got = load_adapter(tmp_path, CFG)
    with open(tmp_path / "adapter_model.safetensors", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(bytes(size))
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


UNIMPLEMENTED = {
    "peft_type": ["LOHA", "lora", None],
    "task_type": ["SEQ_CLS"],
    "bias": ["all", "lora_only"],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "layers_pattern": ["layers"],
    "layer_replication": [[[0, 2]]],
    "target_parameters": [["experts"]],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"],
    "loftq_config": [{"loftq_bits": 4}],
    "use_qalora": [True],
    "use_bdlora": [{"x": 1}],
    "alora_invocation_tokens": [[1]],
    "eva_config": [{"rho": 2}],
    "arrow_config": [{"top_k": 1}],
    "megatron_config": [{"x": 1}],
    "a_later_invention": [True, "x"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in UNIMPLEMENTED.items() for value in values]
)
def test_a_variant_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: None, keep_digest=False)
    edit_config(tmp_path, **{key: value})
    assert f"{key} is {value!r}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "lora_magnitude_vector' is missing"),
        ("rank_pattern", {"q_proj": 8}, "Its rank is 4, adapter_config.json says r=8"),
        ("rank_pattern", {"q_(": 8}, "pattern 'q_(' is not a regular expression"),
        ("layers_to_transform", 0, "target_modules does not cover 'model.layers.1."),
        ("layers_to_transform", [1], "target_modules does not cover 'model.layers.0."),
        ("exclude_modules", ["0.self_attn.q_proj"], "does not cover 'model.layers.0.self_attn.q"),
        (
            "exclude_modules",
            r".*0\.self_attn\.q_proj",
            "does not cover 'model.layers.0.self_attn.q",
        ),
        ("trainable_token_indices", [1], "trainable_tokens_delta' is missing"),
        ("trainable_token_indices", {"lm_head": [1]}, "expected numbers from 0, of embed_tokens"),
        ("layers_to_transform", [5], "names layer 5, but the model has"),
    ],
)
def test_a_variant_that_the_tensors_are_not_of_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: None, keep_digest=False)
    edit_config(tmp_path, **{key: value})
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("alpha_pattern", {"q_proj": 8}), ("use_dora", True)])
def test_a_variant_added_after_training_is_betrayed_by_the_digest(
    tmp_path: Path, key: str, value: object
) -> None:
    write(tmp_path)
    names = [
        k
        for k in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
        if "lora_B" in k
    ]

    def add_magnitudes(tensors: dict) -> None:
        for name in names if key == "use_dora" else []:
            path = name.removesuffix(".lora_B.weight")
            tensors[f"{path}.lora_magnitude_vector"] = torch.ones(len(tensors[name]))

    edit_tensors(tmp_path, add_magnitudes)
    edit_config(tmp_path, **{key: value})
    assert "was changed after training" in refusal(tmp_path)


MALFORMED = {
    "use_dora": ["yes", 1],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 2.5}, {"q_proj": True}, ["q_proj"]],
    "alpha_pattern": [{"q_proj": -1}, {"q_proj": "x"}],
    "layers_to_transform": ["1", [-1], [1.5], [True]],
    "exclude_modules": [3, [3], [""]],
    "trainable_token_indices": ["1", [-1], [1.5]],
    "r": [0, -1, 4.0, "4", True, None, -(10**400)],
    "lora_alpha": [0, "16", True, None, float("nan"), 10**400],
    "lora_dropout": [1.0, -0.1, "0"],
    "use_rslora": ["yes", 1],
    "ensure_weight_tying": ["yes"],
    "target_modules": [None, [], 3, [3], [""], ["all-linear"], ["re:.*q_proj"]],
    "modules_to_save": ["lm_head", "", [3], [""], 3],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in MALFORMED.items() for value in values]
)
def test_a_malformed_field_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: None, keep_digest=False)
    edit_config(tmp_path, **{key: value})
    assert f"adapter_config.json: {key} is {value!r}"[:100] in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ""}, "target_modules pattern '' matches no module"),
        ({"target_modules": "(q_proj"}, "target_modules pattern '(q_proj' is not a regular"),
        ({"target_modules": "q_proj"}, "target_modules pattern 'q_proj' matches no module"),
        ({"modules_to_save": ["norm"]}, "an item of modules_to_save is 'norm'"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write(tmp_path)
    edit_config(tmp_path, **changes)
    assert f"adapter_config.json: {message}" in refusal(tmp_path)


@pytest.mark.parametrize("word", ["all-linear", "All-Linear"])
def test_all_linear_left_in_a_config_is_understood(tmp_path: Path, word: str) -> None:
    tensors = write(tmp_path, dataclasses.replace(PLAIN, target_modules=("all-linear",)))
    edit_tensors(tmp_path, lambda t: None, keep_digest=False)
    edit_config(tmp_path, target_modules=word)
    assert_loads(tmp_path, tensors, dataclasses.replace(PLAIN, target_modules=("all-linear",)))
    edit_tensors(tmp_path, lambda t: [t.pop(k) for k in [*t] if "up_proj" in k])
    assert "up_proj.lora_A.weight' is missing" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_needed_field_may_not_be_missing(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    assert f"{key} is missing" in refusal(tmp_path)


def test_the_smallest_config_is_enough(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    needed = ("peft_type", "r", "lora_alpha", "target_modules")
    config = {key: read_adapter_config(tmp_path)[key] for key in needed}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_loads(tmp_path, tensors)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{Q0}.lora_magnitude_vector", "belongs to DoRA, but use_dora"),
        (f"{Q0}.lora_B.bias", "LoRA variant that is not implemented"),
        (PREFIX + "model.embed_tokens.lora_embedding_A", "does not name embed_tokens"),
        (PREFIX + "lm_head.lora_A.weight", "adapts 'lm_head'"),
        (PREFIX + "model.norm.weight", "replaces a weight of the base model"),
        (PREFIX + "model.embed_tokens.base_layer.weight", "replaces a weight of the base model"),
        (
            PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta",
            "holds trained tokens, but",
        ),
        (f"{Q0}.lora_A.default.weight", "are the same one"),
        ("lm_head.weight", "lacks the prefix"),
    ],
)
def test_a_tensor_that_would_change_the_result_is_refused(
    tmp_path: Path, key: str, message: str
) -> None:
    write(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({key: torch.ones(2)}))
    refused = refusal(tmp_path)
    assert message in refused and repr(key) in refused


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "adapter_model.bin: a pickle can run code and is never opened" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink()
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(tmp_path)


def test_a_truncated_weights_file(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "adapter_model.safetensors: truncated" in refusal(tmp_path)


# ----------------------------------------------------------------------------------------- the card


def test_model_card() -> None:
    card = model_card(
        "org/base: one",
        {
            "data_hash": "ab12",
            "config": {"lora_r": 16, "target_modules": ("q_proj", "v_proj"), "odd|key": "a\nb"},
            "losses": {"final_train": 1.25},
            "nothing": {},
        },
    )
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base: one",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base: one", "lora", "sft", "minisft"],
    }
    for line in (
        "## Run",
        "| data_hash | ab12 |",
        "## Config",
        "| target_modules | q_proj, v_proj |",
        "| odd\\|key | a b |",
        "## Losses",
        "| final_train | 1.25 |",
    ):
        assert line in body.splitlines()
    assert "Nothing" not in body


def test_a_base_name_of_two_lines_stays_one_heading() -> None:
    _, front, body = model_card("org/a\n## b", {"data_hash": "x"}).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "org/a\n## b"
    assert "# LoRA adapter for org/a ## b" in body.splitlines()
