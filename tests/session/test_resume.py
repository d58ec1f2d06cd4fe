"""A resumed run is the uninterrupted one, bit for bit; what cannot be resumed is refused."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from runs import call, flags, metrics, pairs, read, step_lines, train, tree, write_model, write_rows
from safetensors.torch import load_file, save_file

NUMBERS = ("epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "num_loss_tokens")
# 20 rows in micro-batches of 2 x 3: four steps an epoch, the fourth a short one.
SETTINGS = {
    "max_steps": 8, "save_steps": 1, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3, "max_length": 64, "learning_rate": 1e-2,
    "weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine",
}  # fmt: skip
LORA = {"lora_r": 4, "lora_dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The flags that name the model and the rows."""
    directory = tmp_path_factory.mktemp("inputs")
    return {
        "model": write_model(directory / "model"),
        "dataset": write_rows(directory / "train.jsonl", pairs(20)),
        "eval_dataset": write_rows(directory / "eval.jsonl", pairs(6, first=50)),
    }


@pytest.fixture(scope="module")
def settings(inputs):
    return {**inputs, **SETTINGS, **LORA}


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The output directory of an uninterrupted run of eight steps, a checkpoint after each."""
    out = tmp_path_factory.mktemp("whole")
    train(**settings, output_dir=out)
    return out


def killed_copy(whole: Path, out: Path, step: int) -> Path:
    """What a kill soon after checkpoint-`step` leaves: metrics run ahead, the last line torn."""
    out.mkdir()
    for k in range(1, step + 1):
        shutil.copytree(whole / f"checkpoint-{k}", out / f"checkpoint-{k}")
    shutil.copy(whole / "step0.json", out)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    ahead = "".join(lines[: step + 2])  # the eval line of step 0 and step + 1 steps
    (out / "metrics.jsonl").write_text(ahead + lines[step + 2][:25])
    return out


def state_of(checkpoint: Path) -> dict:
    """trainer_state.json but for where the run was written and from where it was resumed."""
    state = read(checkpoint / "trainer_state.json")
    for name in ("output_dir", "resume_from_checkpoint"):
        del state["config"][name]
    return state


def assert_equal_runs(out: Path, whole: Path, first: int) -> None:
    """Every number after step `first`, every checkpoint, and the result are the same."""
    assert [m for m in step_lines(out, *NUMBERS) if m[0] > first] == (
        step_lines(whole, *NUMBERS)[first:]
    )
    for k in range(first + 1, 9):
        ours, theirs = out / f"checkpoint-{k}", whole / f"checkpoint-{k}"
        assert sorted(tree(ours)) == sorted(tree(theirs))
        for file in ours.glob("*.safetensors"):
            assert file.read_bytes() == (theirs / file.name).read_bytes(), (k, file.name)
        assert state_of(ours) == state_of(theirs)
    for file in whole.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    results = [read(d / "train_output.json") for d in (out, whole)]
    assert len({(r["global_step"], r["training_loss"]) for r in results}) == 1
    assert len({r["metrics"].get("eval_loss") for r in results}) == 1


@pytest.mark.parametrize("step", range(1, 8))
def test_resume_from_every_step_is_bit_for_bit(whole, settings, tmp_path, step):
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / f"checkpoint-{step}"
    outcome = train(**settings, output_dir=tmp_path / "out", resume_from_checkpoint=path)
    assert f"resuming from {path} at step {step}" in outcome.out
    assert_equal_runs(tmp_path / "out", whole, step)


def test_the_run_resumed_from_did_learn(whole):
    """Equality means little where nothing moves: losses, copies and moments all change."""
    losses = [loss for _, loss in step_lines(whole, "loss")]
    assert losses[-1] < losses[0] - 0.2
    first, last = whole / "checkpoint-1", whole / "checkpoint-8"
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() != (last / name).read_bytes()
    assert [m[1] for m in step_lines(whole, "epoch")][3:5] == [1.0, 1.3]


def test_full_finetuning_resumes_bit_for_bit(inputs, tmp_path):
    settings = {**inputs, **SETTINGS, "full_finetuning": True, "learning_rate": 1e-3}
    train(**settings, output_dir=tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoint-3"
    train(**settings, output_dir=tmp_path / "out", resume_from_checkpoint=path)
    assert_equal_runs(tmp_path / "out", tmp_path / "whole", 3)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "adafactor", "sgd"])
def test_every_optimizer_learns_and_resumes_bit_for_bit(settings, tmp_path, optim):
    rates = {"learning_rate": 1e-3 if "lion" in optim else 0.3 if optim == "sgd" else 1e-2}
    rates |= {"embedding_learning_rate": 1e-3, "loraplus_lr_ratio": 2}
    settings = {**settings, **rates, "optim": optim}
    train(**settings, output_dir=tmp_path / "whole")
    losses = [loss for _, loss in step_lines(tmp_path / "whole", "loss")]
    assert losses[-1] < losses[0] - 0.02
    path = tmp_path / "whole" / "checkpoint-3"
    train(**settings, output_dir=tmp_path / "out", resume_from_checkpoint=path)
    assert_equal_runs(tmp_path / "out", tmp_path / "whole", 3)


def test_another_optimizer_does_not_resume(settings, whole, tmp_path):
    path = whole / "checkpoint-3"
    changed = {**settings, "output_dir": tmp_path / "out", "resume_from_checkpoint": path}
    outcome = call("train", flags(**changed, optim="adamw_8bit"))
    assert outcome.code == 2 and "--optim was 'adamw', now 'adamw_8bit'" in outcome.err


def test_float16_resumes_its_loss_scale(inputs, tmp_path):
    """A head this large overflows: steps are skipped and the scale halved until gradients fit."""
    model = tmp_path / "model"
    shutil.copytree(inputs["model"], model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= 100
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = {**inputs, **SETTINGS, "model": model, "dtype": "float16", "lora_r": 4}
    train(**settings, output_dir=tmp_path / "whole")
    applied = [norm is not None for _, norm in step_lines(tmp_path / "whole", "grad_norm")]
    assert True in applied and False in applied
    updates, good_steps, loss_scale = 0, 0, 65536.0
    for k, good in enumerate(applied, start=1):
        updates, good_steps = updates + good, good_steps + 1 if good else 0
        loss_scale /= 1 if good else 2
        state = read(tmp_path / f"whole/checkpoint-{k}/trainer_state.json")
        counters = (state["updates"], state["good_steps"], state["loss_scale"])
        assert counters == (updates, good_steps, loss_scale)
    for step in (applied.index(True) + 1, 7):
        out, path = tmp_path / f"out-{step}", tmp_path / "whole" / f"checkpoint-{step}"
        train(**settings, output_dir=out, resume_from_checkpoint=path)
        assert_equal_runs(out, tmp_path / "whole", step)


def test_auto_continues_from_the_newest(whole, settings, tmp_path):
    out = killed_copy(whole, tmp_path / "out", 5)
    outcome = train(**settings, output_dir=out, resume_from_checkpoint="auto")
    assert f"resuming from {out}/checkpoint-5 at step 5" in outcome.out
    assert_equal_runs(out, whole, 5)


def test_metrics_after_a_kill_hold_every_step_once(whole, settings, tmp_path):
    out = killed_copy(whole, tmp_path / "out", 3)
    train(**settings, output_dir=out, resume_from_checkpoint="auto")

    def numbers(directory):
        return [{k: m[k] for k in m if k in (*NUMBERS, "step", "eval_loss")} for m in directory]

    assert numbers(metrics(out)) == numbers(metrics(whole))
    assert [m["step"] for m in metrics(out)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_a_checkpoint_between_two_log_lines_keeps_what_is_not_logged_yet(settings, tmp_path):
    settings = settings | {"logging_steps": 3, "max_steps": 6}
    train(**settings, output_dir=tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoint-4"
    train(**settings, output_dir=tmp_path / "out", resume_from_checkpoint=path)
    lines = step_lines(tmp_path / "whole", *NUMBERS)
    assert [line[0] for line in lines] == [3, 6]
    assert step_lines(tmp_path / "out", *NUMBERS) == lines[1:]


def test_auto_without_a_checkpoint_starts_from_the_beginning(settings, whole, tmp_path):
    outcome = train(**settings, output_dir=tmp_path / "out", resume_from_checkpoint="auto")
    assert "holds no complete checkpoint: starting from step 0" in outcome.out
    assert_equal_runs(tmp_path / "out", whole, 0)


@pytest.mark.parametrize("which", ["auto", "checkpoint-8", "checkpoint-3"])
def test_resuming_a_complete_run_changes_nothing(whole, settings, which):
    before = tree(whole)
    times = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    path = which if which == "auto" else whole / which
    outcome = train(**settings, output_dir=whole, resume_from_checkpoint=path)
    assert "complete already (8 steps); nothing to do" in outcome.out
    assert tree(whole) == before
    assert {p: p.stat().st_mtime_ns for p in times if p.name != ".lock"} == {
        p: t for p, t in times.items() if p.name != ".lock"
    }


def test_a_run_killed_between_the_last_checkpoint_and_its_result_is_completed(
    whole, settings, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("train_output.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    train(**settings, output_dir=out, resume_from_checkpoint="auto")
    assert_equal_runs(out, whole, 8)
    assert [m["step"] for m in metrics(out)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_more_epochs_than_the_complete_run_had_are_trained(inputs, tmp_path):
    settings = {**inputs, "lora_r": 4, "per_device_train_batch_size": 5, "output_dir": tmp_path}
    train(**settings, num_train_epochs=1)
    outcome = train(**settings, num_train_epochs=2, resume_from_checkpoint="auto")
    assert "resuming from" in outcome.out
    assert [m[0] for m in step_lines(tmp_path)] == [1, 2]
    again = train(**settings, num_train_epochs=2, resume_from_checkpoint="auto")
    assert "complete already (2 steps)" in again.out


# ------------------------------------------------------------------------------ damaged checkpoints


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "truncated_adapter": ("adapter_model.safetensors", truncate),
    "flipped_adapter_bit": ("adapter_model.safetensors", flip_a_bit),
    "flipped_moment_bit": ("optimizer.safetensors", flip_a_bit),
    "flipped_state_bit": ("trainer_state.json", flip_a_bit),
    "missing_adapter": ("adapter_model.safetensors", Path.unlink),
    "missing_moments": ("optimizer.safetensors", Path.unlink),
    "missing_manifest": ("manifest.json", Path.unlink),
    "truncated_manifest": ("manifest.json", truncate),
    "empty_manifest": ("manifest.json", lambda file: file.write_text("{}")),
    "manifest_without_moments": (
        "manifest.json",
        lambda file: file.write_text(json.dumps({"files": {}})),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_by_auto_and_refused_by_path(
    whole, settings, tmp_path, kind
):
    name, damage = DAMAGE[kind]
    out = killed_copy(whole, tmp_path / "out", 5)
    damage(out / "checkpoint-5" / name)
    before = tree(out)
    refused = call(
        "train",
        flags(**settings, output_dir=out, resume_from_checkpoint=out / "checkpoint-5"),
    )
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "checkpoint-5" in refused.err and "use an older checkpoint or `auto`" in refused.err
    assert (name if name != "manifest.json" else "manifest") in refused.err
    if kind in ("missing_adapter", "missing_moments"):
        assert f"{name} is missing" in refused.err
    assert tree(out) == before | {".lock": tree(out)[".lock"]}

    outcome = train(**settings, output_dir=out, resume_from_checkpoint="auto")
    skipped = [line for line in outcome.out.splitlines() if "skipping checkpoint-5: " in line]
    assert len(skipped) == 1 and (name if name != "manifest.json" else "manifest") in skipped[0]
    assert f"resuming from {out}/checkpoint-4 at step 4" in outcome.out
    assert_equal_runs(out, whole, 4)


def test_rotation_after_a_damaged_checkpoint_keeps_the_complete_one(whole, settings, tmp_path):
    """The damaged one has the highest number, and must not push out what is newly written."""
    out = killed_copy(whole, tmp_path / "out", 7)
    flip_a_bit(out / "checkpoint-7" / "optimizer.safetensors")
    shutil.rmtree(out / "checkpoint-6")
    changed = settings | {"max_steps": 6, "save_total_limit": 1}
    train(**changed, output_dir=out, resume_from_checkpoint="auto")
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-6"]


def test_going_back_by_path_leaves_no_newer_checkpoint_to_be_picked_up(whole, settings, tmp_path):
    """Checkpoints 4 and 5 belong to a course that was given up: `auto` must not return to it."""
    out = killed_copy(whole, tmp_path / "out", 5)
    changed = settings | {"learning_rate": 1e-3, "max_steps": 4}
    outcome = train(**changed, output_dir=out, resume_from_checkpoint=out / "checkpoint-3")
    assert "checkpoint-4, checkpoint-5" in outcome.out
    names = {p.name for p in out.glob("*checkpoint-*")}
    assert names == {
        *(f"checkpoint-{k}" for k in range(1, 5)),
        *(f"abandoned-checkpoint-{k}" for k in (4, 5)),
    }
    assert [m[0] for m in step_lines(out)] == [1, 2, 3, 4]
    moved = tree(out / "abandoned-checkpoint-5")
    assert moved == tree(whole / "checkpoint-5")
    assert tree(out / "checkpoint-4") != tree(whole / "checkpoint-4")


# --------------------------------------------------------------------------------- changed settings

CHANGES = {
    "lora_r": ({"lora_r": 8}, ["--lora-r was 4, now 8"]),
    "seed": ({"seed": 1}, ["--seed was 3407, now 1"]),
    "dropout": ({"lora_dropout": 0.2}, ["--lora-dropout was 0.1, now 0.2"]),
    "targets": (
        {"target_modules": "q_proj"},
        ["--target-modules was ['q_proj', ", "now ['q_proj']"],
    ),
    "copies": ({"modules_to_save": "lm_head"}, ["--modules-to-save was", "now ['lm_head']"]),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        ["--gradient-accumulation-steps was 3, now 2"],
    ),
    "two_at_once": ({"seed": 1, "lora_alpha": 8}, ["--seed was", "--lora-alpha was 16, now 8.0"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_settings_that_make_another_run_are_refused_with_the_difference(
    whole, settings, tmp_path, kind
):
    changes, wanted = CHANGES[kind]
    out = killed_copy(whole, tmp_path / "out", 5)
    before = tree(out)
    refused = call(
        "train", flags(**settings | changes, output_dir=out, resume_from_checkpoint="auto")
    )
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
    assert all(text in refused.err for text in wanted), refused.err
    assert "checkpoint-5 was made with other settings" in refused.err
    assert "--output-dir" in refused.err
    assert len(re.findall(r" was .*?, now ", refused.err)) == len(changes)
    assert tree(out) == before | {".lock": tree(out)[".lock"]}


def test_other_rows_another_model_or_full_finetuning_are_refused(whole, settings, tmp_path):
    rows = pairs(20)
    rows[7]["completion"] += "!"
    changes = {
        "rows differ": {"dataset": write_rows(tmp_path / "other.jsonl", rows)},
        "config.json differs": {"model": write_model(tmp_path / "other", rms_norm_eps=1e-6)},
        "with --full-finetuning": {"full_finetuning": False},
    }
    del changes["with --full-finetuning"]
    for text, change in changes.items():
        out = killed_copy(whole, tmp_path / text.replace(" ", "_"), 2)
        refused = call(
            "train", flags(**settings | change, output_dir=out, resume_from_checkpoint="auto")
        )
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert text in refused.err and "--output-dir" in refused.err

    out = killed_copy(whole, tmp_path / "full", 2)
    full = {k: v for k, v in settings.items() if k not in LORA} | {"full_finetuning": True}
    refused = call("train", flags(**full, output_dir=out, resume_from_checkpoint="auto"))
    assert refused.code == 2 and "without --full-finetuning" in refused.err


def test_a_changed_learning_rate_is_allowed_and_said(whole, settings, tmp_path):
    out = killed_copy(whole, tmp_path / "out", 5)
    outcome = train(
        **settings | {"learning_rate": 1e-3}, output_dir=out, resume_from_checkpoint="auto"
    )
    assert "--learning-rate is 0.001 now; the checkpoint was made with 0.01" in outcome.out
    ours, theirs = (dict(step_lines(d, "learning_rate")) for d in (out, whole))
    assert ours[5] == theirs[5]
    assert ours[6] == pytest.approx(theirs[6] / 10)
    assert "--output-dir is" in outcome.out and "--seed" not in outcome.out


def test_other_settings_or_a_lost_result_are_not_a_complete_run(settings, tmp_path):
    settings = settings | {"output_dir": tmp_path}
    train(**settings)
    argv = flags(**settings | {"lora_r": 3, "resume_from_checkpoint": "auto"})
    other = call("train", argv)
    assert other.code == 2 and "--lora-r was" in other.err
    missing = call("train", flags(**settings | {"resume_from_checkpoint": tmp_path / "nowhere"}))
    assert missing.code == 2 and "nowhere" in missing.err
    result = tmp_path / "adapter_model.safetensors"
    before = result.read_bytes()
    result.unlink()
    train(**settings, resume_from_checkpoint="auto")
    assert result.read_bytes() == before


def test_a_finished_run_says_what_it_ignores_and_obeys_an_earlier_checkpoint(inputs, tmp_path):
    settings = dict(inputs, output_dir=tmp_path, save_steps=2, lora_r=2, max_length=64, max_steps=4)
    train(**settings, learning_rate=1e-3)
    changed = settings | {"learning_rate": 2e-3}
    finished = train(**changed, resume_from_checkpoint="auto")
    assert "nothing to do" in finished.out
    assert "--learning-rate is 0.002 now and was 0.001" in finished.out
    assert "has changed since" not in finished.out
    later = (tmp_path / "train_output.json").stat().st_mtime + 5
    os.utime(settings["dataset"], (later, later))
    assert "has changed since: the finished run is not affected" in (
        train(**changed, resume_from_checkpoint="auto").out
    )
    earlier = train(**changed, resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert "nothing to do" not in earlier.out and "at step 2" in earlier.out


def test_a_run_that_goes_on_is_complete_no_longer(inputs, tmp_path, monkeypatch):
    """Stopped on its way from an earlier checkpoint, it is not taken for the run it began as."""
    from minisft import run

    settings = dict(inputs, output_dir=tmp_path, save_steps=1, lora_r=2, max_length=64, max_steps=4)
    train(**settings, learning_rate=1e-3)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    changed = settings | {"learning_rate": 2e-3}

    def steps_(state, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from real(state, *args)

    real = run.steps_
    with monkeypatch.context() as patch:
        patch.setattr(run, "steps_", steps_)
        which = {"resume_from_checkpoint": tmp_path / "checkpoint-2"}
        assert call("train", flags(**changed | which)).code == 75
    outcome = train(**changed, resume_from_checkpoint="auto")
    assert "nothing to do" not in outcome.out and "at step 3" in outcome.out
    assert read(tmp_path / "train_output.json")["global_step"] == 4
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before
