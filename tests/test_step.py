"""One step: what its loss and gradient may depend on, what a document may see, what is skipped."""

import dataclasses
import math

import pytest
import torch
from tiny_llama import (
    CFG,
    CPU,
    LORA,
    all_rows,
    dataset_of,
    random_adapter,
    random_dataset,
    random_weights,
    relative,
    state_of,
    whole_model,
)

from minisft import llama
from minisft.batches import IGNORED, Batches, RowSchedule, StepBatch, make_micro_batch
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.train import TrainConfig
from minisft.llama import Compute, Tokens, logits, make_tokens
from minisft.lora import param_groups
from minisft.loss import evaluation, loss_sum
from minisft.nn import documents_of
from minisft.session.evaluate import eval_batches
from minisft.step import ExecutionPlan, loss_and_grads, train_step_

PACKED = [[5, 1, 9], [12], [2, 2], [1], [7, 3, 3, 4], [20], [6], [11, 8]]
DROPPED = dataclasses.replace(LORA, lora_dropout=0.3)
TIED = ModelConfig(**{**vars(CFG), "tie_word_embeddings": True})
CONFIG = TrainConfig(max_grad_norm=1.0, weight_decay=0.1)


def compute(lora=LORA, dtype=torch.float32, cfg=CFG, checkpoint_blocks=False):
    return Compute(cfg, dtype, lora.scaling, lora.lora_dropout, checkpoint_blocks)


def gradients(batch, trainable=None, frozen=None, plan=None):
    """(loss, flat gradient) of a step, of the random adapter unless another is given."""
    return loss_and_grads(
        trainable or random_adapter(),
        random_weights() if frozen is None else frozen,
        batch,
        plan or ExecutionPlan(compute()),
    )


def step_(state, batch, config=CONFIG, dtype=torch.float32, frozen=None, lr=1e-2, **options):
    """train_step_ with the groups of the state's own tensors."""
    shapes = {n: tuple(v.shape) for n, v in state.trainable.views.items()}
    plan = ExecutionPlan(compute(dtype=dtype, **options))
    frozen = random_weights(dtype=dtype) if frozen is None else frozen
    config = dataclasses.replace(config, learning_rate=lr)
    return train_step_(state, frozen, batch, plan, param_groups(shapes, config), config, 1.0)


def step_of(dataset, micro_batches):
    """Build a step from explicitly given micro-batches of rows."""
    micros = [make_micro_batch(dataset, rows, CPU) for rows in micro_batches]
    count = sum(m.targets_M.numel() for m in micros)
    tokens = sum(m.tokens.input_ids_T.numel() for m in micros)
    return StepBatch(micros, count, tokens, [r for rows in micro_batches for r in rows], 1.0)


# ---------------------------------------------------------------- what loss and gradient are


def test_loss_is_the_token_mean_of_minus_log_p():
    """Over all rows of the step, written out from whole logits, one document at a time."""
    dataset = random_dataset(PACKED)
    weights, adapter = random_weights(), random_adapter()
    total, count = 0.0, 0
    for row in range(len(dataset)):
        for start, stop in dataset.row_documents(row):
            ids, labels = dataset.input_ids[start:stop].long(), dataset.labels[start:stop]
            z = logits(adapter.views, weights, make_tokens([ids.tolist()]), compute()).double()
            for t in range(1, stop - start):
                if labels[t] != IGNORED:
                    total -= z[t - 1].log_softmax(0)[labels[t]].item()
                    count += 1
    loss, _ = gradients(all_rows(dataset, max_tokens=25))
    assert count == all_rows(dataset).num_loss_tokens
    assert loss.item() == pytest.approx(total / count, abs=1e-6)


@pytest.mark.parametrize("trained", ["adapter", "copies", "all", "all, tied"])
def test_gradient_is_that_of_finite_differences(trained, monkeypatch):
    """(f(x + h d) - f(x - h d)) / 2h along random directions d, f in float64."""
    cfg = TIED if "tied" in trained else CFG
    lora = LoraConfig(r=3, lora_alpha=6, modules_to_save=("embed_tokens", "lm_head"))
    flat = random_adapter(lora=lora) if trained == "copies" else random_adapter()
    flat = whole_model(cfg) if "all" in trained else flat
    frozen = {n: w for n, w in random_weights(cfg).items() if n not in flat.views}
    batch, plan = all_rows(random_dataset(PACKED)), ExecutionPlan(compute(cfg=cfg))
    _, grad = loss_and_grads(flat, frozen, batch, plan)

    def rms_norm(x, weight, eps):  # the model's own has float32 statistics
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    monkeypatch.setattr(llama, "rms_norm", rms_norm)

    def mean_in_float64(views):
        frozen64 = {n: w.double() for n, w in frozen.items()}
        total = 0.0
        for micro in batch.micro_batches:
            z = logits(views, frozen64, micro.tokens, compute(dtype=torch.float64, cfg=cfg))
            log_p = z[micro.target_rows_M].log_softmax(1)
            total -= log_p.gather(1, micro.targets_M[:, None]).sum().item()
        return total / batch.num_loss_tokens

    generator = torch.Generator().manual_seed(9)
    sizes = [v.numel() for v in flat.views.values()]
    names = list(flat.views)
    for k in [*range(0, len(names), 5), None]:  # single tensors, then all at once
        direction = torch.randn(flat.buffer.shape, generator=generator, dtype=torch.float64)
        if k is not None:
            mask = [torch.full((n,), float(i == k)) for i, n in enumerate(sizes)]
            direction *= torch.cat(mask)
        direction /= direction.norm()
        values = []
        for h in (1e-4, -1e-4):
            moved = (flat.buffer.double() + h * direction).split(sizes)
            views = {n: m.view(flat.views[n].shape) for n, m in zip(names, moved, strict=True)}
            values.append(mean_in_float64(views))
        numeric = (values[0] - values[1]) / 2e-4
        analytic = (grad.double() @ direction).item()
        where = "all" if k is None else names[k]
        assert analytic == pytest.approx(numeric, rel=2e-4, abs=2e-7), where


@pytest.mark.parametrize("max_tokens", [1, 12, 30, 61])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_cut_into_micro_batches_changes_nothing(max_tokens, rate):
    dataset = random_dataset(PACKED)
    plan = ExecutionPlan(compute(dataclasses.replace(LORA, lora_dropout=rate)))
    whole = all_rows(dataset, dropout=rate > 0)
    cut = all_rows(dataset, dropout=rate > 0, max_tokens=max_tokens)
    assert len(whole.micro_batches) == 1 < len(cut.micro_batches)
    loss, grad = gradients(whole, plan=plan)
    cut_loss, cut_grad = gradients(cut, plan=plan)
    assert abs(loss - cut_loss) < 1e-6
    assert relative(cut_grad, grad) < 1e-6
    if rate:
        undropped, _ = gradients(whole)
        assert abs(undropped - loss) > 1e-3


@pytest.mark.parametrize("trained", ["adapter", "all"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_equals_one_big_batch(batch, accumulation, trained):
    """T1: uneven rows of 2 and of 16 targets, so that a mean of means would be another number."""
    dataset = random_dataset([[3]] * 4 + [[17]] * 4, masked=0.0)
    flat = random_adapter() if trained == "adapter" else whole_model()
    big = Batches(dataset, RowSchedule(8, 8, 1, seed=0), 10**6, CPU).batch(0)
    small = Batches(dataset, RowSchedule(8, batch, accumulation, seed=0), batch * 17, CPU).batch(0)
    assert big.num_loss_tokens == small.num_loss_tokens == 4 * 2 + 4 * 16
    loss, grad = gradients(big, flat)
    small_loss, small_grad = gradients(small, flat)
    assert abs(loss - small_loss) < 1e-6
    assert relative(small_grad, grad) < 1e-5
    means = [
        loss_sum(flat.views, random_weights(), m, compute()).item() / m.targets_M.numel()
        for m in Batches(dataset, RowSchedule(8, batch, accumulation, seed=0), 1, CPU)
        .batch(0)
        .micro_batches
    ]
    assert abs(sum(means) / len(means) - loss) > 1e-3, "the rows are too even to tell"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_checkpointing_changes_no_bit(rate, dtype):
    """Recomputed blocks draw the same dropout."""
    lora = dataclasses.replace(LORA, lora_dropout=rate)
    batch = all_rows(random_dataset(PACKED), max_tokens=30, dropout=rate > 0)
    frozen = random_weights(dtype=dtype)
    plain, again = (
        gradients(
            batch, frozen=frozen, plan=ExecutionPlan(compute(lora, dtype, checkpoint_blocks=on))
        )
        for on in (False, True)
    )
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])


def test_checkpointing_keeps_less_for_the_backward_pass():
    """Of a block nothing but its input: the bytes that autograd saves fall."""

    def kept(checkpoint_blocks):
        saved = {}

        def pack(x):
            saved[x.data_ptr()] = x.numel() * x.element_size()
            return x

        leaves = {n: v.requires_grad_() for n, v in random_adapter().views.items()}
        batch = all_rows(random_dataset(PACKED)).micro_batches[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_sum(leaves, random_weights(), batch, compute(checkpoint_blocks=checkpoint_blocks))
        return sum(saved.values())

    assert kept(True) < kept(False) / 3


def test_a_step_without_any_target_has_loss_and_gradient_zero():
    dataset = random_dataset([[5], [7]], masked=1.0)
    batch = all_rows(dataset)
    assert batch.num_loss_tokens == 0
    loss, grad = gradients(batch)
    assert loss.item() == 0 and not grad.any()


def test_rows_without_targets_contribute_exactly_nothing():
    """T11: not NaN, and not a diluted mean: loss and gradient are equal bit for bit."""
    dataset = random_dataset([[20], [9], [14]], masked=0.5)
    dataset.labels[:20] = IGNORED
    without = step_of(dataset, [[1, 2]])
    want = gradients(without)
    for micro_batches in ([[0], [1, 2]], [[1, 2], [0]]):
        apart = step_of(dataset, micro_batches)
        assert apart.num_loss_tokens == without.num_loss_tokens > 0
        assert all(map(torch.equal, gradients(apart), want))
    loss, grad = gradients(step_of(dataset, [[0, 1, 2]]))  # side by side: but for rounding
    assert abs(loss - want[0]) < 1e-6 and relative(grad, want[1]) < 1e-6


def test_a_step_that_trains_nothing_still_counts_its_tokens():
    state = state_of(random_adapter())
    result = step_(state, all_rows(random_dataset([[5], [7]], masked=1.0)))
    assert result == (0.0, 0.0, True)
    assert (state.step, state.num_tokens) == (1, 12)


# ------------------------------------------------------------------------- what may influence what


def label_at(dataset, *positions):
    """The dataset with every label ignored but those at these positions of the token arrays."""
    labels = torch.full_like(dataset.labels, IGNORED)
    labels[list(positions)] = dataset.input_ids[list(positions)]
    return dataclasses.replace(dataset, labels=labels)


@pytest.mark.parametrize("place", [0, 1], ids=["first document", "second document"])
def test_one_label_trains_the_row_before_it(place):
    """T10: the label at index 6 is the target of hidden state 5, neither of 6 nor of 4."""
    dataset = label_at(random_dataset([[9, 9]]), 9 * place + 6)
    micro = make_micro_batch(dataset, [0], CPU)
    target = int(dataset.input_ids[9 * place + 6])
    assert micro.target_rows_M.tolist() == [9 * place + 5]
    assert micro.targets_M.tolist() == [target]
    weights, adapter = random_weights(), random_adapter()
    z = logits(adapter.views, weights, micro.tokens, compute())
    losses = -z.log_softmax(1)[:, target]
    loss, _ = gradients(step_of(dataset, [[0]]))
    assert loss.item() == pytest.approx(losses[9 * place + 5].item(), abs=1e-5)
    assert (losses[[9 * place + 4, 9 * place + 6]] - loss).abs().min() > 1e-2
    (eval_batch,) = eval_batches(dataset, 100, CPU)
    eval_loss, _, _, count = evaluation(adapter.views, weights, [eval_batch], compute())
    assert (eval_loss, count) == (pytest.approx(loss.item(), abs=1e-6), 1)


@pytest.mark.parametrize("lengths", [[8, 8, 8], [7, 11, 5]], ids=["equal", "uneven"])
def test_the_loss_of_a_token_reaches_its_past_in_its_document_alone(lengths):
    """Every token has another id, so that a row of the embedding's gradient is one position."""
    T = sum(lengths)
    ids = torch.randperm(CFG.vocab_size, generator=torch.Generator().manual_seed(0))[:T].tolist()
    documents = [ids[a : a + n] for a, n in zip(starts_of(lengths), lengths, strict=True)]
    dataset = dataset_of([documents], [documents])
    leaves = whole_model()
    for start, n in zip(starts_of(lengths), lengths, strict=True):
        for t in range(start + 1, start + n):
            _, grad = gradients(step_of(label_at(dataset, t), [[0]]), leaves, {})
            names, sizes = zip(*((k, v.numel()) for k, v in leaves.views.items()), strict=True)
            of = dict(zip(names, grad.split(sizes), strict=True))
            rows = of["model.embed_tokens.weight"].view(CFG.vocab_size, -1)[ids]
            reached = rows.abs().sum(1).ne(0).nonzero().squeeze(1).tolist()
            assert reached == list(range(start, t)), "the inputs before t, up to t - 1"


def starts_of(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths))]


def document_logits(documents, cfg=CFG, dtype=torch.float32):
    """The logits of each of several documents that lie side by side."""
    weights, adapter = random_weights(cfg, dtype=dtype), random_adapter(cfg)
    z = logits(adapter.views, weights, make_tokens(documents), compute(dtype=dtype, cfg=cfg))
    return z.split([len(d) for d in documents])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 9)], ids=["equal", "uneven"])
def test_a_document_does_not_see_its_neighbour(lengths, dtype):
    """T2: other tokens in the first leave the second's logits as they are, bit for bit."""
    first, second = (list(range(10, 10 + n)) for n in lengths)
    other = [90 - t for t in first]
    before = document_logits([first, second], dtype=dtype)
    after = document_logits([other, second], dtype=dtype)
    assert torch.equal(before[1], after[1])
    assert relative(after[0], before[0]) > 0.1
    behind = document_logits([first, [95] * lengths[1]], dtype=dtype)
    assert torch.equal(before[0], behind[0])


@pytest.mark.parametrize("lengths", [(6, 6, 6), (4, 1, 9), (1, 2)], ids=str)
def test_packed_documents_equal_separate_ones(lengths):
    documents = [[(7 * i + 3 * t) % 97 for t in range(n)] for i, n in enumerate(lengths)]
    for packed, document in zip(document_logits(documents), documents, strict=True):
        (alone,) = document_logits([document])
        assert relative(packed, alone) < 1e-6


def test_packed_rows_have_the_loss_of_separate_rows():
    """T3, T4: the same documents in three rows and in twelve."""
    packed = random_dataset([[5, 1, 9, 12], [2, 2, 1, 7], [3, 3, 4, 20]])
    separate = dataclasses.replace(packed, row_offsets=torch.arange(13))
    a, b = all_rows(packed, max_tokens=30), all_rows(separate, max_tokens=11)
    assert a.num_loss_tokens == b.num_loss_tokens
    (loss, grad), (separate_loss, separate_grad) = gradients(a), gradients(b)
    assert abs(loss - separate_loss) < 1e-6 and relative(grad, separate_grad) < 1e-6
    positions = a.micro_batches[0].tokens.position_ids_T
    lengths = a.micro_batches[0].tokens.documents.lengths
    assert positions.tolist() == [t for n in lengths for t in range(n)]


def test_positions_are_what_the_model_turns_by():
    """RoPE is relative: an offset changes nothing, a stretch does. So positions are really used."""
    weights = random_weights()
    ids, documents = torch.arange(10, 22), documents_of((12,))
    base = logits({}, weights, Tokens(ids, torch.arange(12), documents), compute())
    moved = logits({}, weights, Tokens(ids, torch.arange(12) + 30, documents), compute())
    stretched = logits({}, weights, Tokens(ids, torch.arange(12) * 2, documents), compute())
    assert relative(moved, base) < 1e-5 < 1e-2 < relative(stretched, base)


# --------------------------------------------------------------------------------------- evaluation


def test_eval_loss_does_not_depend_on_the_batch_size():
    """T12: rows of 1 to 20 targets; a mean of the batches' means moves by far more."""
    dataset = random_dataset([[2 + (7 * i) % 20] for i in range(65)], masked=0.2)
    dropped = compute(DROPPED)
    results = [
        evaluation(random_adapter().views, random_weights(), eval_batches(dataset, n, CPU), dropped)
        for n in (1, 22, 90, 10**6)
    ]
    losses, _, _, counts = zip(*results, strict=True)
    assert set(counts) == {all_rows(dataset).num_loss_tokens}
    assert max(losses) - min(losses) < 1e-6
    assert losses[0] == pytest.approx(gradients(all_rows(dataset))[0].item(), abs=1e-6)


def test_nothing_is_dropped_out_in_evaluation():
    """Not even from a training batch, which carries the keys of its dropout."""
    dataset = random_dataset(PACKED)
    batch = all_rows(dataset, dropout=True)
    plan = ExecutionPlan(compute(DROPPED))
    loss, *_ = evaluation(
        random_adapter().views, random_weights(), batch.micro_batches, plan.compute
    )
    assert loss == pytest.approx(gradients(all_rows(dataset))[0].item(), abs=1e-6)
    assert abs(gradients(batch, plan=plan)[0] - loss) > 1e-3


def test_eval_loss_of_nothing_is_not_a_number():
    loss, _, _, count = evaluation(random_adapter().views, random_weights(), [], compute())
    assert math.isnan(loss) and count == 0


# -------------------------------------------------------------------------------------- train_step_


def copies_of(state):
    return [x.clone() for x in (state.trainable.buffer, *state.moments.values())]


def unchanged(state, copies):
    now = (state.trainable.buffer, *state.moments.values())
    return all(map(torch.equal, now, copies))


def test_a_step_is_adamw_on_the_clipped_gradient():
    """By torch's own optimizer and clipping, from the same gradient."""
    batch = all_rows(random_dataset(PACKED))
    config = TrainConfig(max_grad_norm=0.05, weight_decay=0.1, adam_beta1=0.8)
    state = state_of(whole_model())
    theirs = {n: v.clone().requires_grad_() for n, v in state.trainable.views.items()}
    plain = [p for n, p in theirs.items() if "norm" not in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": plain, "weight_decay": 0.1},
            {"params": [p for n, p in theirs.items() if "norm" in n], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.8, 0.999),
    )
    for _ in range(3):
        loss, grad = gradients(batch, state.trainable, {})
        sizes = [p.numel() for p in theirs.values()]
        for p, g in zip(theirs.values(), grad.split(sizes), strict=True):
            p.grad = g.view(p.shape).clone()
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.05)
        optimizer.step()
        result = step_(state, batch, config, frozen={})
        assert result.applied and result.loss == loss.item()
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6) and norm > 0.05
        for name, p in theirs.items():
            assert torch.allclose(state.trainable.views[name], p, rtol=1e-6, atol=1e-7), name
    assert (state.step, state.updates, state.num_tokens) == (3, 3, 3 * batch.num_tokens)


def test_training_lowers_the_loss():
    batch = all_rows(random_dataset(PACKED))
    state = state_of(random_adapter(b_scale=0.0))
    losses = [step_(state, batch, checkpoint_blocks=True).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    assert state.total_loss == pytest.approx(sum(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_one_checkpointed_step_every_b_has_moved(dtype):
    """T14: the embedding is frozen, yet gradients reach all fourteen adapters."""
    state = state_of(random_adapter(b_scale=0.0))
    step_(state, all_rows(random_dataset(PACKED)), dtype=dtype, checkpoint_blocks=True)
    halves = {n: v for n, v in state.trainable.views.items() if "lora_B" in n}
    assert len(halves) == 14
    assert all(v.ne(0).float().mean() > 0.99 for v in halves.values())


def test_masters_are_float32_and_move_at_a_small_rate():
    """T15: bfloat16 masters would lose steps of 1e-5 to rounding."""
    state = state_of(random_adapter())
    before = state.trainable.buffer.clone()
    for seed in range(20):
        batch = all_rows(random_dataset(PACKED, seed=seed))
        step_(state, batch, TrainConfig(weight_decay=0.0), torch.bfloat16, lr=1e-5)
    assert state.trainable.buffer.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in state.trainable.views.values())
    moved = (state.trainable.buffer - before).abs()
    assert (moved == 0).float().mean() < 0.01
    assert moved.max() < 20 * 1.5e-5


def test_half_precision_gradients_are_near_float32_s():
    batch = all_rows(random_dataset(PACKED))
    _, want = gradients(batch)
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        plan = ExecutionPlan(compute(dtype=dtype), loss_scale=2.0**10)
        _, grad = gradients(batch, frozen=random_weights(dtype=dtype), plan=plan)
        assert grad.dtype == torch.float32
        assert relative(grad, want) < bound


def test_the_loss_scale_is_taken_out_again():
    """A power of two: nothing but exponents changes in float32."""
    batch = all_rows(random_dataset(PACKED), max_tokens=30)
    plain, scaled = (
        gradients(batch),
        gradients(batch, plan=ExecutionPlan(compute(), loss_scale=2.0**12)),
    )
    assert torch.equal(plain[0], scaled[0])
    assert relative(scaled[1], plain[1]) < 1e-6


def test_the_loss_scale_keeps_small_gradients_from_vanishing():
    """In float16 what lies below 6e-8 is zero, unless it was scaled up."""
    batch = all_rows(random_dataset([[60]] * 8))
    quiet = random_adapter(b_scale=3e-6)  # makes the gradient of A small
    counts = []
    for scale in (1.0, 2.0**16):
        plan = ExecutionPlan(compute(dtype=torch.float16), loss_scale=scale)
        _, grad = gradients(batch, quiet, random_weights(dtype=torch.float16), plan)
        assert grad.isfinite().all()
        counts.append((grad == 0).float().mean().item())
    assert counts[0] > 0.05 and counts[1] == 0


def test_float16_training_is_finite():
    batch = all_rows(random_dataset(PACKED), max_tokens=30)
    state = state_of(random_adapter(b_scale=0.0), loss_scale=2.0**16)
    results = [step_(state, batch, dtype=torch.float16) for _ in range(20)]
    assert all(math.isfinite(r.loss) for r in results)
    assert [r for r in results if r.applied][-1].loss < results[0].loss - 0.5
    assert state.trainable.buffer.isfinite().all()
    assert state.updates == sum(r.applied for r in results) > 15
    assert state.good_steps <= state.updates


def test_an_overflow_halves_the_scale_and_skips_the_update():
    batch = all_rows(random_dataset(PACKED))
    state = state_of(random_adapter(), loss_scale=2.0**40)
    state.good_steps = 7
    before = copies_of(state)
    result = step_(state, batch, dtype=torch.float16)
    assert not result.applied and math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert unchanged(state, before)
    assert (state.loss_scale, state.good_steps, state.updates, state.step) == (2.0**39, 0, 0, 1)
    skipped = 0
    while not step_(state, batch, dtype=torch.float16).applied:
        skipped += 1
        assert unchanged(state, before) and state.loss_scale == 2.0 ** (38 - skipped + 1)
    assert not unchanged(state, before)
    assert (state.good_steps, state.updates, state.step) == (1, 1, skipped + 2)


def test_a_skipped_step_does_not_count_for_the_moments():
    """After a skip the first update is AdamW's first: its bias corrections start at 1."""
    batch = all_rows(random_dataset(PACKED))
    skipping, straight = (state_of(random_adapter(), loss_scale=2.0**k) for k in (40, 5))
    assert not step_(skipping, batch, dtype=torch.float16).applied
    skipping.loss_scale = 2.0**5
    for state in (skipping, straight):
        assert step_(state, batch, dtype=torch.float16).applied
    assert torch.equal(skipping.trainable.buffer, straight.trainable.buffer)


def test_the_scale_doubles_after_2000_good_steps():
    batch = all_rows(random_dataset(PACKED))
    state = state_of(random_adapter(), loss_scale=4.0)
    state.good_steps = 1998
    scales = []
    for _ in range(3):
        step_(state, batch, dtype=torch.float16)
        scales.append((state.loss_scale, state.good_steps))
    assert scales == [(4.0, 1999), (8.0, 0), (8.0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_no_loss_scale(dtype):
    state = state_of(random_adapter())
    step_(state, all_rows(random_dataset(PACKED)), dtype=dtype)
    assert (state.loss_scale, state.good_steps) == (1.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_untouched(poison, dtype):
    frozen = random_weights(dtype=dtype)
    frozen["model.layers.1.mlp.up_proj.weight"][3, 4] = poison
    state = state_of(random_adapter())
    before = copies_of(state)
    result = step_(state, all_rows(random_dataset(PACKED)), dtype=dtype, frozen=frozen)
    assert not result.applied and not math.isfinite(result.loss)
    assert unchanged(state, before) and (state.updates, state.step) == (0, 1)


def test_a_gradient_that_is_not_finite_leaves_the_weights_untouched(monkeypatch):
    from minisft import step

    def poisoned(trainable, *_):
        grads = torch.ones_like(trainable.buffer)
        grads[5] = float("inf")
        return torch.tensor(1.5), grads

    monkeypatch.setattr(step, "loss_and_grads", poisoned)
    state = state_of(random_adapter())
    before = copies_of(state)
    result = step_(state, all_rows(random_dataset(PACKED)))
    assert result == (1.5, float("inf"), False)
    assert unchanged(state, before)
