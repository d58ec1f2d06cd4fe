"""Which modules an adapter touches, and what is said when a name is wrong."""

from __future__ import annotations

import pytest

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.model import LINEAR_NAMES, ModelConfig
from minisft.config.targets import adapter_shapes, match_targets, split_targets

CFG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
)
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def matched(*items: str, saved: tuple[str, ...] = ()) -> list[str]:
    return match_targets(LoraConfig(target_modules=items, modules_to_save=saved), CFG)


def refusal(*items: str, saved: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        matched(*items, saved=saved)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (("q_proj",), [Q0, Q1]),
        (("self_attn.q_proj",), [Q0, Q1]),
        (("1.self_attn.q_proj",), [Q1]),
        ((Q0,), [Q0]),
        (("re:.*q_proj",), [Q0, Q1]),
        ((r"re:model\.layers\.1\..*\.q_proj",), [Q1]),
        (("all-linear",), list(CFG.linear_paths())),
        (("All-Linear",), list(CFG.linear_paths())),
        (LINEAR_NAMES, list(CFG.linear_paths())),
        (("q_proj", "lm_head"), [Q0, Q1]),
    ],
)
def test_matching(items: tuple[str, ...], expected: list[str]) -> None:
    assert matched(*items) == expected


def test_a_suffix_starts_at_a_dot() -> None:
    assert "'proj' matches no linear" in refusal("proj")


@pytest.mark.parametrize("pattern", ["re:q_proj", r"re:.*\.self_attn\.q"])
def test_a_pattern_matches_the_whole_path(pattern: str) -> None:
    assert "matches no module" in refusal(pattern)


def test_order_is_that_of_the_model_not_of_the_list() -> None:
    assert matched("up_proj", "q_proj") == matched("q_proj", "up_proj")


def test_a_misspelt_name_gets_a_guess_and_the_known_names() -> None:
    message = refusal("q_proj", "k_porj")
    assert "'k_porj'" in message and "'k_proj'" in message
    assert all(name in message for name in (*LINEAR_NAMES, "embed_tokens", "lm_head", "all-linear"))


def test_a_layer_that_is_not_there_is_refused() -> None:
    assert "'2.self_attn.q_proj'" in refusal("2.self_attn.q_proj")


def test_a_malformed_pattern_is_refused_with_its_place() -> None:
    assert "at position 0" in refusal("re:(q_proj")


@pytest.mark.parametrize("pattern", ["re:.*", "re:.*self_attn.*", "re:.*(q_proj|lm_head)"])
def test_a_pattern_that_reaches_another_module_is_refused(pattern: str) -> None:
    assert "also matches" in refusal(pattern)


def test_a_pattern_may_cover_a_trained_copy() -> None:
    # PEFT leaves modules_to_save out of the matching.
    assert matched("re:.*(q_proj|lm_head)", saved=("lm_head",)) == [Q0, Q1]


@pytest.mark.parametrize("special", ["all-linear", "re:.*q_proj"])
def test_special_forms_stand_alone(special: str) -> None:
    assert "must stand alone" in refusal("q_proj", special)


@pytest.mark.parametrize("items", [(), ("lm_head",)])
def test_no_linear_at_all_is_refused(items: tuple[str, ...]) -> None:
    assert "names no linear module" in refusal(*items)


def test_split_moves_embeddings_to_the_trained_copies() -> None:
    lora = LoraConfig(r=3, target_modules=("lm_head", "q_proj"), modules_to_save=("embed_tokens",))
    split = split_targets(lora)
    assert split.target_modules == ("q_proj",)
    assert split.modules_to_save == ("embed_tokens", "lm_head")
    assert split.r == 3
    assert split_targets(split) == split


def test_split_knows_the_full_path_of_the_embedding() -> None:
    lora = LoraConfig(modules_to_save=("model.embed_tokens", "embed_tokens"))
    assert split_targets(lora).modules_to_save == ("embed_tokens",)


def test_split_refuses_other_trained_copies() -> None:
    with pytest.raises(UserError, match="'norm'"):
        split_targets(LoraConfig(modules_to_save=("norm",)))


def test_shapes_of_every_tensor() -> None:
    lora = LoraConfig(r=3, target_modules=("k_proj", "1.mlp.down_proj", "lm_head"))
    k0, k1 = "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"
    assert adapter_shapes(lora, CFG) == {
        f"{k0}.lora_A.weight": (3, 64),
        f"{k0}.lora_B.weight": (40, 3),
        f"{k1}.lora_A.weight": (3, 64),
        f"{k1}.lora_B.weight": (40, 3),
        "model.layers.1.mlp.down_proj.lora_A.weight": (3, 112),
        "model.layers.1.mlp.down_proj.lora_B.weight": (64, 3),
        "lm_head.weight": (96, 64),
    }
