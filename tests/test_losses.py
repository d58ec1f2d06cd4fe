"""Loss variants against their formulas from whole logits; NEFTune's noise and where it is not."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from runs import metrics, pairs, train, write_model, write_rows
from tiny_llama import CFG, LORA, all_rows, random_adapter, random_dataset, random_weights, relative

from minisft import loss as loss_module
from minisft.llama import Compute, embedding_noise, hidden_states, logits
from minisft.loss import evaluation
from minisft.step import ExecutionPlan, loss_and_grads

ROWS = [[5, 9], [12], [2, 2], [1], [7, 3, 4], [20], [6], [11, 8]]
COMPUTE = Compute(CFG, lora_scaling=LORA.scaling)


def by_formula(kind, batch, views):
    """Mean loss of the step from whole logits, with gradients to views."""
    total = 0.0
    for micro in batch.micro_batches:
        z = logits(views, random_weights(), micro.tokens, COMPUTE)[micro.target_rows_M]
        if kind == "dft":
            nll = F.cross_entropy(z, micro.targets_M, reduction="none")
            total = total + (nll * (-nll).exp().detach()).sum()
        else:
            smoothing = float(kind)
            total = total + F.cross_entropy(
                z, micro.targets_M, reduction="sum", label_smoothing=smoothing
            )
    return total / batch.num_loss_tokens


@pytest.mark.parametrize("kind", ["dft", "0.1", "0.5"])
@pytest.mark.parametrize("rows_at_a_time", [4096, 7])
def test_loss_and_gradient_equal_the_formula(kind, rows_at_a_time, monkeypatch):
    """In one micro-batch and in several, a few rows of logits at a time."""
    monkeypatch.setattr(loss_module, "rows_of_logits", lambda V: rows_at_a_time)
    settings = {"loss_type": "dft"} if kind == "dft" else {"label_smoothing": float(kind)}
    flat = random_adapter()
    leaves = {n: v.detach().clone().requires_grad_() for n, v in flat.views.items()}
    whole = all_rows(random_dataset(ROWS))
    want = by_formula(kind, whole, leaves)
    want.backward()
    grad = torch.cat([leaves[n].grad.flatten() for n in flat.views])
    plan = ExecutionPlan(dataclasses.replace(COMPUTE, **settings))
    for batch in (whole, all_rows(random_dataset(ROWS), max_tokens=21)):
        loss, ours = loss_and_grads(flat, random_weights(), batch, plan)
        assert loss.item() == pytest.approx(want.item(), abs=1e-6)
        assert relative(ours, grad) < 1e-5
    plain, _ = loss_and_grads(flat, random_weights(), whole, ExecutionPlan(COMPUTE))
    assert abs(plain - want) > 0.01


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}, {"label_smoothing": 0.1}])
def test_a_micro_batch_without_targets_adds_nothing(settings):
    """All labels ignored: exactly zero, and no gradient."""
    plan = ExecutionPlan(dataclasses.replace(COMPUTE, **settings))
    batch = all_rows(random_dataset([[4], [6]], masked=2.0))
    assert batch.num_loss_tokens == 0
    loss, grads = loss_and_grads(random_adapter(), random_weights(), batch, plan)
    assert loss.item() == 0 and not grads.any()


def test_smoothing_does_not_touch_the_eval_loss():
    views, weights = random_adapter().views, random_weights()
    batches = all_rows(random_dataset(ROWS)).micro_batches
    smooth = dataclasses.replace(COMPUTE, label_smoothing=0.3, neftune_alpha=5.0)
    assert evaluation(views, weights, batches, smooth) == (
        evaluation(views, weights, batches, COMPUTE)
    )


def test_logits_never_exist_as_a_whole(monkeypatch):
    monkeypatch.setattr(loss_module, "rows_of_logits", lambda V: 5)
    seen = []
    original = loss_module.variant_sum

    def watched(h, *rest):
        seen.append(len(h))
        return original(h, *rest)

    monkeypatch.setattr(loss_module, "variant_sum", watched)
    plan = ExecutionPlan(dataclasses.replace(COMPUTE, loss_type="dft"))
    loss_and_grads(random_adapter(), random_weights(), all_rows(random_dataset(ROWS)), plan)
    assert max(seen) == 5 and len(seen) > 10


# ------------------------------------------------------------------------------------------ NEFTune


def noise(lengths, step=0, alpha=5.0, seed=0):
    batch = all_rows(random_dataset(lengths), dropout=True, step=step, seed=seed)
    (micro,) = batch.micro_batches
    x = torch.zeros(micro.tokens.input_ids_T.shape[0], 64)
    return embedding_noise(micro.tokens, x, alpha), micro.tokens.documents.lengths


def test_noise_is_uniform_up_to_alpha_over_the_root_of_length_and_width():
    found, lengths = noise([[400], [100], [25, 25]])
    assert sum(lengths) == 550
    for part, length in zip(found.split(lengths), lengths, strict=True):
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.97 * bound < part.abs().max() <= bound
        scaled = (part / bound).flatten().sort().values  # against the uniform's distribution
        ideal = torch.linspace(-1, 1, len(scaled))
        assert (scaled - ideal).abs().max() < 4 / math.sqrt(len(scaled))
        neighbours = torch.stack((part[:-1].flatten(), part[1:].flatten()))
        assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.1


def test_noise_depends_on_seed_and_step_alone():
    first, _ = noise([[30], [10]])
    assert torch.equal(first, noise([[30], [10]])[0])
    assert not torch.equal(first, noise([[30], [10]], step=1)[0])
    assert not torch.equal(first, noise([[30], [10]], seed=1)[0])


def test_noise_is_on_the_embeddings_of_training_only():
    views, weights = random_adapter().views, random_weights()
    noisy = dataclasses.replace(COMPUTE, neftune_alpha=5.0)
    plain = all_rows(random_dataset(ROWS)).micro_batches[0].tokens
    keyed = all_rows(random_dataset(ROWS), dropout=True).micro_batches[0].tokens
    still = hidden_states(views, weights, plain, COMPUTE)
    assert torch.equal(hidden_states(views, weights, plain, noisy), still)
    assert torch.equal(hidden_states(views, weights, keyed, COMPUTE), still)
    assert not torch.equal(hidden_states(views, weights, keyed, noisy), still)


# --------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "dft"}, {"label_smoothing": 0.1}, {"neftune_noise_alpha": 5.0}],
    ids=lambda s: next(iter(s)),
)
def test_a_run_learns_and_resumes_bit_for_bit(tmp_path, settings):
    model = write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", pairs(20))
    given = {"model": model, "dataset": rows, "eval_dataset": rows, "lora_r": 4, "max_steps": 6}
    given |= {"max_length": 64, "learning_rate": 1e-2, "save_steps": 3, **settings}
    train(**given, output_dir=tmp_path / "a")
    path = tmp_path / "a" / "checkpoint-3"
    train(**given, output_dir=tmp_path / "b", resume_from_checkpoint=path)
    a, b = (metrics(tmp_path / n) for n in "ab")
    losses = [[m["loss"] for m in lines if "loss" in m] for lines in (a, b)]
    assert losses[1] == losses[0][3:]
    evals = [m["eval_loss"] for m in a if "eval_loss" in m]
    assert evals[-1] < evals[0] - 0.05
    train(**(given | dict.fromkeys(settings, {"loss_type": "nll"}.get(*settings, 0))),
          output_dir=tmp_path / "plain")  # fmt: skip
    plain = [m["loss"] for m in metrics(tmp_path / "plain") if "loss" in m]
    assert plain != losses[0]
