"""Evaluation: what its numbers are, which one is best, when it stops, what stays on disk."""

import json
import math

import pytest
import torch
from runs import call, flags, metrics, pairs, read, train, write_model, write_rows
from safetensors.torch import load_file
from tiny_llama import CFG, CPU, LORA, random_adapter, random_dataset, random_weights, state_of

import minisft.run as run_module
from minisft import loss as loss_module
from minisft.batches import IGNORED
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.files.checkpoint import list_checkpoints
from minisft.llama import Compute, logits, make_tokens
from minisft.loss import evaluation
from minisft.session import evaluate as evaluate_module
from minisft.session.evaluate import eval_batches, eval_prompts, note_evaluation_, stops_early

LENGTHS = [[5, 1, 9], [12], [2, 2], [1], [7, 3, 3, 4], [20], [6], [11, 8], *[[30]] * 20]
SMALL = {"lora_r": 4, "max_length": 64, "learning_rate": 1e-2, "load_in_4bit": False}
# Rows of the eval loss at steps 1 to 8: two falls, a plateau, one more fall, then rises.
SCRIPT = [3.0, 2.0, 2.5, 2.0, 1.9, 2.1, 2.2, 2.3]


def found(max_tokens, lengths=LENGTHS):
    batches = eval_batches(random_dataset(lengths), max_tokens, CPU)
    return evaluation(
        random_adapter().views, random_weights(), batches, Compute(CFG, lora_scaling=LORA.scaling)
    )


def by_whole_logits(lengths=LENGTHS):
    """Loss, entropy and accuracy over all trained tokens from whole logits in float64."""
    dataset, sums = random_dataset(lengths), torch.zeros(4, dtype=torch.float64)
    for row in range(len(dataset)):
        for start, stop in dataset.row_documents(row):
            ids, labels = dataset.input_ids[start:stop].long(), dataset.labels[start:stop]
            compute = Compute(CFG, lora_scaling=LORA.scaling)
            views = random_adapter().views
            z = logits(views, random_weights(), make_tokens([ids.tolist()]), compute).double()
            log_p = z.log_softmax(1)
            for t in range(1, stop - start):
                if labels[t] != IGNORED:
                    p = log_p[t - 1]
                    right = p.argmax() == labels[t]
                    sums += torch.stack([-p[labels[t]], -(p * p.exp()).sum(), right, right * 0 + 1])
    return (sums[:3] / sums[3]).tolist(), int(sums[3])


def test_means_equal_a_computation_from_whole_logits():
    (loss, entropy, accuracy), count = by_whole_logits()
    got = found(10**9)
    assert got.count == count and 0 < accuracy < 1
    assert got[:3] == pytest.approx((loss, entropy, accuracy), abs=1e-6)


@pytest.mark.parametrize("max_tokens", [1, 13, 25])
def test_the_cut_into_batches_changes_nothing(max_tokens):
    assert found(max_tokens) == pytest.approx(found(10**9), abs=1e-6)


def test_chunks_of_rows_change_nothing(monkeypatch):
    whole = found(10**9)
    monkeypatch.setattr(loss_module, "rows_of_logits", lambda V: 3)
    assert found(10**9) == pytest.approx(whole, abs=1e-6)


def test_without_targets_there_is_no_mean():
    assert all(math.isnan(x) for x in found(10**9, [[1], [1, 1]])[:3])


# --------------------------------------------------------------------------------------- decisions


def decisions(values, **settings):
    """(best step, whether stopped) after each evaluation of a scripted sequence."""
    settings = {"eval_strategy": "steps", "load_best_model_at_end": True, **settings}
    config = TrainConfig(eval_dataset="x", **settings)
    state, seen = state_of(random_adapter()), []
    for value in values:
        state.step += 1
        note_evaluation_(state, {config.best_metric[0]: value}, config)
        seen.append((state.best_step, stops_early(state, config)))
    return seen


def test_better_is_strictly_better():
    assert [best for best, _ in decisions(SCRIPT)] == [1, 2, 2, 2, 5, 5, 5, 5]
    assert not any(stopped for _, stopped in decisions(SCRIPT))
    greater = decisions(SCRIPT, metric_for_best_model="eval_mean_token_accuracy")
    assert [best for best, _ in greater] == [1] * 8
    assert decisions(SCRIPT, greater_is_better=True) == greater
    nan = decisions([math.nan, 2.0, math.nan, 1.0], early_stopping_patience=2)
    assert nan == [(0, False), (2, False), (2, False), (4, False)]


def test_patience_counts_evaluations_that_gain_less_than_the_threshold():
    first_stop = {
        (patience, threshold): [s for _, s in decisions(
            SCRIPT, early_stopping_patience=patience, early_stopping_threshold=threshold
        )].index(True) + 1
        for patience, threshold in ((1, 0.0), (2, 0.0), (3, 0.0), (2, 1.0), (3, 0.5))
    }  # fmt: skip
    # 0.1 at step 5 is no more than 0.5, and 1.0 at step 2 no more than 1.0.
    assert first_stop == {(1, 0.0): 3, (2, 0.0): 4, (3, 0.0): 8, (2, 1.0): 3, (3, 0.5): 5}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    return {
        "model": write_model(directory / "model"),
        "dataset": write_rows(directory / "train.jsonl", pairs(20)),
        "eval_dataset": write_rows(directory / "eval.jsonl", pairs(6, first=50)),
    }


@pytest.fixture
def scripted(monkeypatch):
    """Evaluation after step n gives SCRIPT[n - 1]."""

    def evaluate(run, dataset):
        loss = SCRIPT[run.state.step - 1] if run.state.step else 9.0
        return {"eval_loss": loss, "eval_mean_token_accuracy": 0.5, "eval_entropy": 1.0}

    monkeypatch.setattr(evaluate_module, "evaluate", evaluate)


def checkpoints(out):
    return [int(p.name.removeprefix("checkpoint-")) for p in list_checkpoints(out)]


def trainer_s(out, limit, patience, steps):
    """(checkpoints left after each step, steps done, best step) of transformers' Trainer."""
    transformers = pytest.importorskip("transformers")
    seen = []

    class Scripted(transformers.Trainer):
        def evaluate(self, *args, **kwargs):
            found = {"eval_loss": SCRIPT[self.state.global_step - 1]}
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, found
            )
            return found

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append(sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")))

    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=steps, eval_strategy="steps", eval_steps=1, save_steps=1,
        save_total_limit=limit, load_best_model_at_end=True, report_to="none", use_cpu=True,
        disable_tqdm=True, save_only_model=True, per_device_train_batch_size=1,
    )  # fmt: skip
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * steps
    trainer = Scripted(
        transformers.LlamaForCausalLM(config), arguments, train_dataset=rows, eval_dataset=rows
    )
    trainer.add_callback(Watch())
    if patience:
        trainer.add_callback(transformers.EarlyStoppingCallback(patience))
    trainer.train()
    return seen[1:], trainer.state.global_step, trainer.state.best_global_step


@pytest.mark.parametrize(("limit", "patience"), [(1, 0), (2, 3), (3, 2)])
def test_best_rotation_and_early_stop_are_trainer_s(
    inputs, scripted, monkeypatch, tmp_path, limit, patience
):
    seen = []
    steps_ = run_module.steps_

    def watched(*args):
        for result in steps_(*args):
            if checkpoints(tmp_path / "ours"):
                seen.append(checkpoints(tmp_path / "ours"))
            yield result

    monkeypatch.setattr(run_module, "steps_", watched)
    train(
        **inputs, **SMALL, output_dir=tmp_path / "ours", max_steps=8, eval_strategy="steps",
        eval_steps=1, save_steps=1, save_total_limit=limit, load_best_model_at_end=True,
        early_stopping_patience=patience,
    )  # fmt: skip
    result = read(tmp_path / "ours" / "train_output.json")
    theirs = trainer_s(tmp_path / "theirs", limit, patience, 8)
    assert (seen, result["global_step"], result["metrics"]["best_step"]) == theirs
    last, best = result["global_step"], result["metrics"]["best_step"]
    assert {last, best} <= set(checkpoints(tmp_path / "ours"))


# --------------------------------------------------------------------------------------- whole runs


def test_the_best_weights_are_exported(inputs, tmp_path):
    """A rate that overshoots: the last evaluation is not the best."""
    settings = {**inputs, **SMALL, "learning_rate": 0.1, "max_steps": 4}
    settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 0}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    outcome = train(**settings, output_dir=tmp_path, load_best_model_at_end=True)
    losses = {m["step"]: m["eval_loss"] for m in reversed(metrics(tmp_path)) if "eval_loss" in m}
    result = read(tmp_path / "train_output.json")["metrics"]
    best = result["best_step"]
    assert best < 4 and losses[best] == min(losses.values()) < losses[4]
    assert result["eval_loss"] == losses[best]
    assert [m["step"] for m in metrics(tmp_path) if "eval_loss" in m] == [0, 1, 2, 3, 4]
    ours, kept = (load_file(d / "adapter_model.safetensors") for d in (
        tmp_path, tmp_path / f"checkpoint-{best}"
    ))  # fmt: skip
    assert all(torch.equal(ours[name], kept[name]) for name in ours)
    assert f"best: step {best}, eval_loss" in outcome.out
    running, saved = math.inf, []
    for step in range(1, 5):
        if losses[step] < running:
            running = losses[step]
            saved.append(step)
    assert checkpoints(tmp_path) == sorted({*saved, 4})
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "train_output.json").unlink()  # a kill before the result
    settings |= {"load_best_model_at_end": True, "resume_from_checkpoint": "auto"}
    train(**settings, output_dir=tmp_path)
    again = read(tmp_path / "train_output.json")["metrics"]
    assert all(again[name] == result[name] for name in again if "eval" in name)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    (tmp_path / "train_output.json").unlink()
    settings["eval_dataset"] = write_rows(tmp_path / "other.jsonl", pairs(3, first=60))
    train(**settings, output_dir=tmp_path)
    other = read(tmp_path / "train_output.json")["metrics"]["eval_loss"]
    assert other != result["eval_loss"]
    assert [metrics(tmp_path)[-1][name] for name in ("step", "eval_loss")] == [best, other]


def test_a_best_of_another_kind_is_not_compared(inputs, tmp_path):
    settings = {**inputs, **SMALL, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"save_steps": 1, "load_best_model_at_end": True, "output_dir": tmp_path}
    train(**settings)
    settings |= {"max_steps": 3, "resume_from_checkpoint": "auto"}
    for name, value in (
        ("metric_for_best_model", "mean_token_accuracy"),
        ("eval_dataset", write_rows(tmp_path / "other.jsonl", pairs(3, first=60))),
    ):
        outcome = call("train", flags(**settings | {name: value}))
        assert outcome.code == 2 and f"--{name.replace('_', '-')} was" in outcome.err
    assert checkpoints(tmp_path) == [1, 2]
    train(**settings)


def test_a_best_without_its_checkpoint_is_forgotten(inputs, tmp_path):
    """The run before kept none of it; or it is in another run's directory."""
    settings = {**inputs, **SMALL, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.1}
    settings |= {"lr_scheduler_type": "constant", "save_steps": 3, "max_grad_norm": 0}
    train(**settings, max_steps=3, output_dir=tmp_path / "a")
    asked = {"load_best_model_at_end": True, "max_steps": 4, "save_steps": 1}
    for name, which in (("a", "auto"), ("b", tmp_path / "a" / "checkpoint-3")):
        outcome = train(
            **settings | asked, output_dir=tmp_path / name, resume_from_checkpoint=which
        )
        result = read(tmp_path / name / "train_output.json")
        assert "has no checkpoint in" in outcome.out and result["global_step"] == 4
        losses = {m["step"]: m["eval_loss"] for m in metrics(tmp_path / name) if "eval_loss" in m}
        best = min((3, 4), key=losses.__getitem__)
        assert result["metrics"]["best_step"] == best and best in checkpoints(tmp_path / name)


def test_the_best_is_said_only_where_it_counts(inputs, tmp_path):
    settings = {**inputs, **SMALL, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    train(**settings, output_dir=tmp_path)
    assert "best_step" not in read(tmp_path / "train_output.json")["metrics"]


@pytest.mark.parametrize("change", ["count", "rows"])
def test_before_and_after_are_of_the_same_rows(inputs, tmp_path, change):
    settings = {**inputs, **SMALL, "max_steps": 2, "eval_generate": 2, "output_dir": tmp_path}
    train(**settings)
    both = read(tmp_path / "train_output.json")["metrics"]
    assert len(both["samples"]) == 2 and both["eval_loss_before"] is not None
    settings |= {"max_steps": 3, "resume_from_checkpoint": "auto"}
    if change == "count":
        settings["eval_generate"] = 3
    else:
        settings["eval_dataset"] = write_rows(tmp_path / "other.jsonl", pairs(3, first=60))
    outcome = train(**settings)
    after = read(tmp_path / "train_output.json")["metrics"]
    assert "samples" not in after
    assert (after["eval_loss_before"] is None) == (change == "rows")
    assert ("was computed on other eval rows" in outcome.out) == (change == "rows")


def test_the_expected_answer_ends_where_its_turn_ends():
    """Take the first of two trained turns, without the user's next message."""
    ids, trained = [1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 0, 1]
    data = random_dataset([[len(ids)]])
    data.input_ids[:] = torch.tensor(ids)
    data.labels[:] = torch.tensor([i if t else IGNORED for i, t in zip(ids, trained, strict=True)])
    assert eval_prompts(data, 1) == ([[1, 2]], [[3, 4]])
    data.labels[2:] = data.input_ids[2:]
    assert eval_prompts(data, 1) == ([[1, 2]], [[3, 4, 5, 6, 7]])


@pytest.mark.parametrize(("threshold", "named"), [(0, ""), (0.5, ", or by no more than 0.5")])
def test_a_threshold_is_named_where_it_stopped_the_run(
    inputs, scripted, tmp_path, threshold, named
):
    outcome = train(
        **inputs, **SMALL, output_dir=tmp_path, max_steps=8, eval_strategy="steps", eval_steps=1,
        early_stopping_patience=2, early_stopping_threshold=threshold,
    )  # fmt: skip
    assert f"no better than step 2's eval_loss 2.0000{named}\n" in outcome.out


def test_an_early_stop_is_an_end(inputs, scripted, tmp_path):
    settings = {**inputs, **SMALL, "output_dir": tmp_path, "max_steps": 8, "save_steps": 100}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    outcome = train(**settings)
    assert "stopped early after step 4: 2 evaluations in a row were no better than step 2" in (
        outcome.out
    )
    assert read(tmp_path / "train_output.json")["global_step"] == 4
    assert checkpoints(tmp_path) == [1, 2, 4]
    assert "complete already" in train(**settings, resume_from_checkpoint="auto").out
    (tmp_path / "train_output.json").unlink()  # a kill before the result
    assert "resuming" in train(**settings, resume_from_checkpoint="auto").out
    assert read(tmp_path / "train_output.json")["global_step"] == 4
    more = train(**settings | {"early_stopping_patience": 3}, resume_from_checkpoint="auto")
    assert "done: 8 steps" in more.out


def test_a_best_checkpoint_that_is_damaged_is_told(inputs, scripted, tmp_path, monkeypatch):
    settings = {**inputs, **SMALL, "output_dir": tmp_path, "max_steps": 3}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    take = run_module.take_best_

    def damaged(run):
        (run.out / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"x")
        take(run)

    monkeypatch.setattr(run_module, "take_best_", damaged)
    outcome = call("train", flags(**settings))
    assert outcome.code == 2 and "checkpoint-2, the best checkpoint" in outcome.err


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [("no", []), ("epoch", [3, 6, 7]), ("steps", [2, 4, 6, 7])],
)
def test_save_strategies(inputs, tmp_path, strategy, wanted):
    settings = {**inputs, **SMALL, "max_steps": 7, "save_strategy": strategy}
    settings |= {"save_steps": 2} if strategy == "steps" else {}
    train(**settings, output_dir=tmp_path)
    assert checkpoints(tmp_path) == wanted


def test_eval_batch_size_does_not_change_the_numbers(inputs, tmp_path):
    """Trainer's mean of batch means weighted by rows would: the answers have uneven lengths."""
    names = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy", "eval_num_loss_tokens")
    seen = []
    for size in (1, 4, 6):
        out = tmp_path / str(size)
        train(**inputs, **SMALL, output_dir=out, max_steps=1, per_device_eval_batch_size=size)
        seen.append([m[n] for m in metrics(out) if "eval_loss" in m for n in names])
    assert seen[1] == pytest.approx(seen[0], abs=1e-6)
    assert seen[2] == pytest.approx(seen[0], abs=1e-6)


def test_answers_are_written_at_every_evaluation(inputs, tmp_path):
    settings = {**inputs, **SMALL, "max_steps": 2, "eval_generate": 3, "output_dir": tmp_path}
    outcome = train(**settings, eval_strategy="steps", eval_steps=1, save_steps=1)
    lines = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [0] * 3 + [1] * 3 + [2] * 3
    assert set(lines[0]) == {"step", "prompt", "expected", "answer", "right", "stopped"}
    assert "answers at step 1: 0 of 3 right, end of turn in" in outcome.out
    before = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "train_output.json").unlink()
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    train(**settings, resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert (tmp_path / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_model_at_end": True}, "--load-best-model-at-end needs --eval-strategy"),
        ({"early_stopping_patience": 2}, "--early-stopping-patience needs --eval-strategy"),
        ({"save_strategy": "best"}, "--save-strategy best needs --eval-strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "no"},
            "--save-strategy is no; use best",
        ),
        ({"metric_for_best_model": "f1"}, "expected one of loss, mean_token_accuracy, entropy"),
        ({"save_strategy": "step"}, "expected one of no, steps, epoch, best"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(eval_dataset="x", **settings)
