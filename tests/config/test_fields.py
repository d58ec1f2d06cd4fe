"""Settings are declared on their fields: for resuming, for subclasses, and old spellings."""

import dataclasses
import importlib.util
import json
import sys

import pytest
from runs import pairs, train, write_model, write_rows

from minisft.config.errors import UserError
from minisft.config.fields import Fixed, Free, fixed_on_resume, settings
from minisft.config.flags import parse_flags
from minisft.config.names import respelled
from minisft.config.train import TrainConfig
from minisft.files.disk import file_digest

FIXED = {
    "dtype", "load_in_4bit", "max_length", "lora_r", "lora_alpha", "lora_dropout", "use_rslora",
    "target_modules", "modules_to_save", "full_finetuning", "optim", "packing", "packing_strategy",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "loss_type",
    "label_smoothing", "neftune_noise_alpha", "use_dora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "exclude_modules", "init_lora_weights", "trainable_token_indices",
    "lora_embeddings",
}  # fmt: skip


def test_every_field_says_whether_a_resume_may_change_it():
    """Mutant: `preview: Annotated[int, at_least(0)]`, without Free."""
    for name, setting in settings(TrainConfig).items():
        marks = [note for note in setting.notes if note in (Fixed, Free)]
        assert len(marks) == 1, name
    assert set(fixed_on_resume(TrainConfig)) == FIXED


def test_every_field_has_a_type_that_is_checked():
    """Mutant: `settings` without its branch for tuple[str, ...]."""
    assert all(setting.kind is not object for setting in settings(TrainConfig).values())


# A file of a user: with and without postponed evaluation of annotations.
MINE = """
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from minisft.config.fields import Fixed, at_least
from minisft.config.train import TrainConfig


@dataclass(frozen=True)
class MyConfig(TrainConfig):
    margin: float = 0.5
    beam: Annotated[int, Fixed, at_least(1)] = 4
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    table: dict[str, float] | None = None
    place: Path = Path("here")
    nothing: str | None = None
"""


@pytest.fixture(params=["", "from __future__ import annotations\n"], ids=["eager", "postponed"])
def my_config(request, tmp_path):
    """MyConfig, imported from a file of its own."""
    file = tmp_path / "mine.py"
    file.write_text(request.param + MINE)
    spec = importlib.util.spec_from_file_location("mine_of_a_user", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.MyConfig
    del sys.modules[spec.name]


def test_a_subclass_in_a_file_of_the_user_works(my_config):
    """Mutant: `settings` raises for a type that it does not know, as the old table did."""
    config = my_config(lora_r=8, margin=1, names="x,y", table={"a": 1.0}, optim="adamw_torch")
    assert (config.lora.r, config.margin, config.names) == (8, 1, ("x", "y"))
    assert config.table == {"a": 1.0} and config.optim == "adamw"
    assert dataclasses.replace(config, kind="b").kind == "b"
    assert set(fixed_on_resume(my_config)) == FIXED | {"beam"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": "x"}, "--margin is 'x'; expected float"),
        ({"beam": 0}, "--beam is 0; expected at least 1"),
        ({"kind": "c"}, "--kind is 'c'; expected one of a, b"),
        ({"names": [1]}, "--names holds 1; expected a list of strings"),
        ({"nothing": 1}, "--nothing is 1; expected str or None"),
        ({"lora_r": 0}, "--lora-r is 0; expected at least 1"),
    ],
)
def test_the_fields_of_a_subclass_are_checked(my_config, settings, message):
    """Mutant: `settings` reads the fields of TrainConfig, whatever class it is given."""
    with pytest.raises(UserError, match=message):
        my_config(**settings)


def test_a_subclass_has_flags(tmp_path):
    """Mutant: `parse_flags` reads the settings of TrainConfig, whatever class it is given."""
    config = parse_flags(Plain, ["--margin", "2", "--r", "4"], prog="x", default=Plain())
    assert (config.margin, config.lora_r) == (2.0, 4)
    (tmp_path / "x.yaml").write_text("margin: 3\n")
    argv = ["--config", str(tmp_path / "x.yaml")]
    assert parse_flags(Plain, argv, prog="x", default=Plain()).margin == 3.0


@dataclasses.dataclass(frozen=True)
class Plain(TrainConfig):
    """A subclass of this file."""

    margin: float = 0.5


# ------------------------------------------------------------------------------- old spellings

OLD = ("gate_up", "gate_up+qkv", "gate_up+offload", "gate_up+qkv+offload")


@pytest.mark.parametrize("old", OLD)
def test_the_old_names_of_the_policies_are_accepted(old):
    """Mutant: [spellings] without the last entry of a policy."""
    new = f"recompute_{old}"
    assert TrainConfig(gradient_checkpointing=old).gradient_checkpointing == new
    recorded = {"gradient_checkpointing": old, "optim": "adamw_torch", "unknown": [1], "seed": 1}
    assert {name: respelled(name, value) for name, value in recorded.items()} == {
        "gradient_checkpointing": new, "optim": "adamw", "unknown": [1], "seed": 1
    }  # fmt: skip


def test_a_checkpoint_with_an_old_spelling_resumes_without_a_word_of_it(tmp_path):
    """Mutant: `resume_` compares the recorded settings without `respelled`."""
    place = tmp_path / "out"
    settings = {
        "model": write_model(tmp_path / "model"), "dtype": "float32", "lora_r": 2,
        "dataset": write_rows(tmp_path / "rows.jsonl", pairs(8)), "max_length": 32,
        "output_dir": place, "step_impl": "explicit", "load_in_4bit": False,
        "gradient_checkpointing": "recompute_gate_up",
    }  # fmt: skip
    train(**settings, max_steps=1)
    for file in (place / "run.json", place / "checkpoint-1" / "trainer_state.json"):
        recorded = json.loads(file.read_text())
        assert recorded["config"]["gradient_checkpointing"] == "recompute_gate_up"
        recorded["config"]["gradient_checkpointing"] = "gate_up"
        file.write_text(json.dumps(recorded))
    again = {**settings, "resume_from_checkpoint": "auto"}
    told = train(**again, max_steps=1).out
    assert "complete already (1 steps)" in told and "--gradient-checkpointing" not in told
    manifest, state = (place / "checkpoint-1" / n for n in ("manifest.json", "trainer_state.json"))
    raw = json.loads(manifest.read_text())
    raw["files"][state.name] = file_digest(state)
    manifest.write_text(json.dumps(raw))
    told = train(**again, max_steps=2).out
    assert "resuming from" in told and "--max-steps is 2 now" in told
    assert "--gradient-checkpointing is" not in told
