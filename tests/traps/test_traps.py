"""The 27 traps that have bitten trainers of language models, each as a test.

Every test is known to see its bug: tests/traps/mutants.py puts the bug in and runs it.
"""

import json
import math
import re
import shutil

import pytest
import torch
from minisft.kernels.linear_cross_entropy import linear_cross_entropy
from runs import (
    CONFIG,
    call,
    flags,
    metrics,
    pairs,
    read,
    step_lines,
    train,
    tree,
    write_model,
    write_rows,
)
from safetensors.torch import load_file, save_file
from tiny_tokenizer import SPECIALS, TEMPLATE, write_byte_level
from tokenised import tokenize_rows

from minisft.batches import IGNORED, RowSchedule, StepBatch, TokenizedDataset, make_micro_batch
from minisft.config.hf import parse_model_config, parse_rope
from minisft.config.train import TrainConfig
from minisft.files.weights import load_model_config, open_checkpoint, stream_weights
from minisft.llama import Compute, hidden_states, logits, make_tokens
from minisft.lora import allocate, init_lora_, trainable_shapes
from minisft.loss import evaluation, loss_sum
from minisft.nn import rms_norm
from minisft.rope import rope_inverse_frequencies
from minisft.session.generate import stop_ids
from minisft.step import ExecutionPlan, loss_and_grads
from minisft.text.encoding import encode
from minisft.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")
FULL = {"load_in_4bit": False, "lora_r": 4, "max_length": 64, "learning_rate": 1e-2}
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def weights(model):
    return load_file(model / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture
def given(model, tmp_path):
    """Flags of a small run on 20 rows."""
    return {"model": model, "dataset": write_rows(tmp_path / "rows.jsonl", pairs(20)), **FULL}


def dataset(documents, labels=None):
    """A TokenizedDataset of one document a row; labels None: every token is trained."""
    labels = labels or documents
    return TokenizedDataset(
        input_ids=torch.tensor([i for d in documents for i in d], dtype=torch.int32),
        labels=torch.tensor([i for d in labels for i in d], dtype=torch.int32),
        document_offsets=torch.tensor([0, *(len(d) for d in documents)]).cumsum(0),
        row_offsets=torch.arange(len(documents) + 1),
        stats={},
    )


def packed(documents):
    """The same with all documents in one row."""
    data = dataset(documents)
    return TokenizedDataset(
        data.input_ids, data.labels, data.document_offsets, torch.tensor([0, len(documents)]), {}
    )


def ids(count, seed=0):
    return torch.randint(5, 380, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def adapter(model, seed=1):
    """LoRA tensors of every linear, B not zero."""
    cfg = load_model_config(model)
    lora = TrainConfig(model=str(model), dataset="x", lora_r=4).lora
    flat = allocate(trainable_shapes(lora, cfg), CPU)
    init_lora_(flat, seed)
    for i, (name, view) in enumerate(flat.views.items()):
        if "lora_B" in name:
            view.normal_(std=0.05, generator=torch.Generator().manual_seed(i))
    return flat, lora, cfg


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


TALK = chat(
    ("user", "hello there"), ("assistant", "good day"), ("user", "a lazy dog?"),
    ("assistant", "very fine, thank you"),
)  # fmt: skip


def assistant_only(tokenizer, messages=TALK):
    return tokenize_rows(
        [{"messages": messages}], tokenizer, format=None, max_length=None, source="rows",
        assistant_only_loss=True,
    )  # fmt: skip


# ------------------------------------------------------------------------- 1 to 4: batches, packing


def test_t01_the_loss_is_the_mean_over_tokens_however_a_step_is_cut(model, weights, tmp_path):
    documents = [ids(n + 1, i) for i, n in enumerate((2, 2, 2, 2, 16, 16, 16, 16))]
    data, (flat, lora, cfg) = dataset(documents), adapter(model)
    compute = Compute(cfg, lora_scaling=lora.scaling)
    found = []
    for cut in ([list(range(8))], [[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)]):
        micro = [make_micro_batch(data, rows, CPU) for rows in cut]
        batch = StepBatch(micro, 72, 80, list(range(8)), 1.0)
        found.append(loss_and_grads(flat, weights, batch, ExecutionPlan(compute)))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        assert (grads - found[0][1]).norm() / found[0][1].norm() < 1e-5
    # the same through the command line
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": d} for d in documents])
    runs = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        out = tmp_path / f"{batch}"
        train(
            **FULL, model=model, dataset=path, output_dir=out, max_steps=3,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        runs.append(torch.tensor(step_lines(out, "loss", "grad_norm", "num_loss_tokens")))
    for other in runs[1:]:
        assert (other - runs[0]).abs().max() < 1e-4


def test_t02_packed_documents_do_not_see_each_other(model, weights):
    first, other, second = ids(9, 1), ids(9, 2), ids(13, 3)
    compute = Compute(load_model_config(model))
    runs = [logits({}, weights, make_tokens([d, second]), compute)[9:] for d in (first, other)]
    alone = logits({}, weights, make_tokens([second]), compute)
    assert torch.equal(*runs)
    torch.testing.assert_close(runs[0], alone, rtol=1e-5, atol=1e-5)


def test_t03_positions_start_at_0_in_every_document():
    batch = make_micro_batch(packed([ids(5), ids(3), ids(7)]), [0], CPU)
    assert batch.tokens.position_ids_T.tolist() == [*range(5), *range(3), *range(7)]


def test_t04_no_target_crosses_into_the_next_document():
    documents = [ids(5, 1), ids(3, 2), ids(7, 3)]
    batch = make_micro_batch(packed(documents), [0], CPU)
    assert batch.targets_M.tolist() == [i for d in documents for i in d[1:]]
    ends = [4, 7, 14]  # what stands there predicts nothing
    assert not set(batch.target_rows_M.tolist()) & set(ends) and len(batch.targets_M) == 12


# ------------------------------------------------------------------ 5 to 9: the text that is learnt


@pytest.mark.parametrize("pad", ["<|pad|>", "<|eot|>"])
def test_t05_the_end_of_text_is_appended_and_trained_where_pad_is_eos_too(tmp_path, pad):
    tokenizer = load_tokenizer(write_byte_level(tmp_path, pad_token=pad))
    for rows in ([{"text": "hello"}], [{"prompt": "hello", "completion": " there"}]):
        found = tokenize_rows(rows, tokenizer, format=None, max_length=None, source="rows")
        assert found.input_ids[-1] == found.labels[-1] == tokenizer.eos_token_id
        assert found.input_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_t06_the_end_of_a_turn_is_part_of_what_the_assistant_learns(model, tokenizer):
    found = assistant_only(tokenizer)
    trained = (found.labels != IGNORED).tolist()
    ends = [i for i in range(len(trained)) if trained[i] and not (*trained, False)[i + 1]]
    assert len(ends) == 2
    stops = stop_ids(tokenizer, load_model_config(model))
    assert all(found.labels[i].item() in stops for i in ends)


def test_t07_the_mask_holds_the_assistants_turns_and_nothing_else(tokenizer):
    found = assistant_only(tokenizer)
    trained = found.labels[found.labels != IGNORED].tolist()
    text = tokenizer.backend.decode(trained, skip_special_tokens=False)
    assert text == "good day<|eot|>very fine, thank you<|eot|>"
    # the same spans from the lengths of the rendered beginnings of the chat
    wanted, before = [], ""
    from minisft.text.chat import render

    names = {"special_tokens": tokenizer.special_tokens}
    for n in range(1, len(TALK) + 1):
        whole = render(TEMPLATE, TALK[:n], **names)
        if TALK[n - 1]["role"] == "assistant":
            before = render(TEMPLATE, TALK[: n - 1], add_generation_prompt=True, **names)
        count = len(encode(tokenizer, whole, add_special_tokens=False))
        start = len(encode(tokenizer, before, add_special_tokens=False))
        if TALK[n - 1]["role"] == "assistant":
            wanted += range(start, count)
    assert (found.labels != IGNORED).nonzero().squeeze(1).tolist() == wanted


@pytest.mark.parametrize("template_writes", [True, False])
@pytest.mark.parametrize("tokenizer_adds", [True, False])
def test_t08_there_is_one_bos_and_it_stands_first(tmp_path, template_writes, tokenizer_adds):
    template = TEMPLATE if template_writes else TEMPLATE.replace("{{ bos_token }}", "")
    tokenizer = load_tokenizer(
        write_byte_level(tmp_path, adds_bos=tokenizer_adds, chat_template=template)
    )
    kinds = {
        "chat": ([{"messages": TALK}], template_writes),
        "text": ([{"text": "hello"}], tokenizer_adds),
        "pair": ([{"prompt": "hello", "completion": " there"}], tokenizer_adds),
    }
    for rows, expected in kinds.values():
        found = tokenize_rows(rows, tokenizer, format=None, max_length=None, source="rows")
        bos = (found.input_ids == tokenizer.bos_token_id).nonzero().squeeze(1).tolist()
        assert bos == ([0] if expected else [])


def test_t08_training_and_asking_see_the_same_ids(model, tokenizer, tmp_path):
    from runs import script

    generate = script("generate")
    config = generate.GenerateConfig(prompt=("hello there",))
    asked = generate.prompt_ids(tokenizer, config, chat(("user", "hello there")))
    rows = [{"messages": chat(("user", "hello there"), ("assistant", "good day"))}]
    found = tokenize_rows(rows, tokenizer, format=None, max_length=None, source="rows")
    assert found.input_ids.tolist()[: len(asked)] == asked and len(asked) > 8


def test_t09_the_result_carries_the_template_that_it_was_trained_with(given, tokenizer, tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": TALK}] * 4)
    train(**given | {"dataset": path}, output_dir=tmp_path / "out", max_steps=1)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    exported = load_tokenizer(tmp_path / "out")
    ours, theirs = (
        tokenize_rows([{"messages": TALK}], t, format=None, max_length=None, source="rows")
        for t in (tokenizer, exported)
    )
    assert torch.equal(ours.input_ids, theirs.input_ids)


# ------------------------------------------------------------------- 10 to 12: labels and the loss


def test_t10_a_label_at_6_is_predicted_by_the_state_at_5(model, weights):
    document = ids(12)
    labels = [IGNORED] * 12
    labels[6] = document[6]
    batch = make_micro_batch(dataset([document], [labels]), [0], CPU)
    compute = Compute(load_model_config(model))
    h_TD = hidden_states({}, weights, batch.tokens, compute).detach().requires_grad_()
    loss = linear_cross_entropy(
        h_TD[batch.target_rows_M], weights["lm_head.weight"], batch.targets_M
    )
    loss.backward()
    assert h_TD.grad.abs().sum(1).nonzero().squeeze(1).tolist() == [5]
    probabilities = logits({}, weights, batch.tokens, compute)[5].log_softmax(0)
    wanted = -probabilities[document[6]].item()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert loss_sum({}, weights, batch, compute).item() == pytest.approx(wanted, rel=1e-5)
    assert evaluation({}, weights, [batch], compute).loss == pytest.approx(wanted, rel=1e-5)


def test_t11_rows_whose_answer_is_cut_off_are_dropped_and_counted(given, tmp_path):
    rows = [{"prompt": "a " * 60, "completion": " b"}] * 3 + pairs(5)
    path = write_rows(tmp_path / "long.jsonl", rows)
    train(**given | {"dataset": path, "max_length": 48}, output_dir=tmp_path / "out", max_steps=1)
    record = read(tmp_path / "out" / "run.json")["data"]
    assert record["rows_kept"] == 5 and sum(record["dropped"].values()) == 3
    path = write_rows(tmp_path / "none.jsonl", rows[:3])
    none = given | {"dataset": path, "max_length": 48, "output_dir": tmp_path / "none"}
    outcome = call("train", flags(**none))
    assert outcome.code == 2 and "--max-length" in outcome.err


def test_t11_a_micro_batch_without_labels_contributes_nothing(model, weights):
    flat, lora, cfg = adapter(model)
    compute = Compute(cfg, lora_scaling=lora.scaling)
    documents = [ids(8, 1), ids(8, 2)]
    data = dataset(documents, [documents[0], [IGNORED] * 8])
    micro = [make_micro_batch(data, [i], CPU) for i in (0, 1)]
    plan = ExecutionPlan(compute)
    alone = loss_and_grads(flat, weights, StepBatch(micro[:1], 7, 8, [0], 1.0), plan)
    both = loss_and_grads(flat, weights, StepBatch(micro[::-1], 7, 16, [1, 0], 1.0), plan)
    assert torch.equal(alone[0], both[0]) and torch.equal(alone[1], both[1])


def test_t12_the_eval_loss_does_not_depend_on_the_batch_size(given, tmp_path):
    path = write_rows(tmp_path / "eval.jsonl", pairs(65, first=40))
    found = []
    for size in (1, 2, 8, 64):
        train(
            **given, eval_dataset=path, per_device_eval_batch_size=size, max_steps=1,
            output_dir=tmp_path / f"{size}",
        )  # fmt: skip
        found.append(metrics(tmp_path / f"{size}")[0])
    assert max(m["eval_loss"] for m in found) - min(m["eval_loss"] for m in found) < 1e-5
    assert len({m["eval_num_loss_tokens"] for m in found}) == 1
    assert read(tmp_path / "1" / "run.json")["eval_data"]["rows_kept"] == 65


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_t13_every_row_is_seen_once_an_epoch_over_all_ranks(rows, world):
    schedule = RowSchedule(num_rows=rows, batch_size=2, accumulation=2, seed=7, world=world)
    for epoch in range(3):
        first = epoch * schedule.steps_per_epoch
        seen = [
            row
            for step in range(first, first + schedule.steps_per_epoch)
            for rank in range(world)
            for micro in schedule.rows(step, rank)
            for row in micro
        ]
        assert sorted(seen) == list(range(rows))


# --------------------------------------------------------------------- 14 to 19: steps and numbers


@pytest.mark.parametrize("how", ["none", "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])  # the explicit pass, and autograd
def test_t14_every_adapted_module_learns(given, tmp_path, how, dropout):
    more = {"gradient_checkpointing": how, "lora_dropout": dropout}
    train(**given, **more, output_dir=tmp_path / "out", max_steps=2)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    sums = {k: t.abs().sum().item() for k, t in tensors.items() if "lora_B" in k}
    assert len(sums) == 14 and min(sums.values()) > 0


def test_t15_small_steps_in_half_precision_are_not_rounded_away(given, tmp_path):
    """The trained tensors stay float32 under bfloat16: at 1e-5 every entry of A moves."""
    settings = given | {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "lora_r": 16}
    train(**settings, dtype="bfloat16", output_dir=tmp_path, max_steps=20, save_steps=1)
    first, last = (
        load_file(tmp_path / f"checkpoint-{k}" / "adapter_model.safetensors") for k in (1, 20)
    )
    assert all(t.dtype == torch.float32 for t in last.values())
    still = [(first[k] == last[k]).float().mean().item() for k in last if "lora_A" in k]
    assert sum(still) / len(still) < 0.01


def test_t16_large_activations_stay_finite_in_float16():
    x_TD = torch.full((2, 64), 6e4, dtype=torch.float16)
    x_TD[0, ::2] *= -1
    normed = rms_norm(x_TD, torch.ones(64), 1e-5)
    assert normed.isfinite().all() and (normed.abs() - 1).abs().max() < 1e-2
    head = torch.full((32, 64), 0.5, dtype=torch.float16)
    head[0] = -0.5
    loss = linear_cross_entropy(x_TD[1:] / 64, head, torch.tensor([3]))
    assert loss.isfinite() and loss.item() == pytest.approx(math.log(31), rel=1e-2)


def test_t17_a_nan_shows_in_the_log_and_changes_nothing(given, model, tmp_path):
    rows = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [5, 6, 7, 8 + i]} for i in range(4)])
    broken = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][9] = float("nan")  # of one row
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    settings = given | {"model": broken, "dataset": rows, "save_steps": 1, "max_steps": 8}
    outcome = call(
        "train",
        flags(
            **settings, output_dir=tmp_path / "out", per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
        ),
    )  # fmt: skip
    assert outcome.code == 3 and "the loss is nan" in outcome.err
    assert "Rows of the step: 1." in outcome.err
    last = metrics(tmp_path / "out")[-1]
    assert last["loss"] is None and f"step {last['step']}:" in outcome.err
    for path in (tmp_path / "out").glob("checkpoint-*/*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point())


def test_t18_a_resumed_run_sees_the_same_rows_rates_and_masks(given, tmp_path):
    settings = given | {
        "num_train_epochs": 3, "save_steps": 1, "lora_dropout": 0.1, "warmup_steps": 2,
        "gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    train(**settings, output_dir=tmp_path / "whole")
    names = ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch")
    whole = step_lines(tmp_path / "whole", *names)
    assert len(whole) == 12
    for step in (3, 4, 9):  # within an epoch, at its end, in the last
        out = tmp_path / f"{step}"
        path = tmp_path / "whole" / f"checkpoint-{step}"
        train(**settings, output_dir=out, resume_from_checkpoint=path)
        assert step_lines(out, *names) == whole[step:]
        file = "adapter_model.safetensors"
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_t19_the_learning_rate_is_that_of_the_closed_form(given, tmp_path, accumulation):
    settings = given | {"gradient_accumulation_steps": accumulation, "warmup_steps": 3}
    train(**settings, output_dir=tmp_path / "out", max_steps=10)
    rates = [m[1] for m in step_lines(tmp_path / "out", "learning_rate")]
    wanted = [1e-2 * (i / 3 if i < 3 else (10 - i) / 7) for i in range(10)]
    assert rates == pytest.approx(wanted, rel=1e-9)
    cosine = settings | {"lr_scheduler_type": "cosine", "warmup_steps": 0}
    train(**cosine, output_dir=tmp_path / "cosine", max_steps=8)
    rates = [m[1] for m in step_lines(tmp_path / "cosine", "learning_rate")]
    wanted = [1e-2 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx(wanted, rel=1e-9)


# ------------------------------------------------------------------- 20 to 24: bases and adapters


def merged(out, place, **more):
    outcome = call("merge", flags(adapter=out, output_dir=place, dtype="float32", **more))
    assert outcome.code == 0, outcome.err
    cfg = load_model_config(place)
    tensors = dict(stream_weights(open_checkpoint(place, cfg)))
    return logits({}, tensors, make_tokens([ids(16)]), Compute(cfg))


def live(model, out):
    """Logits of base + adapter with plain arithmetic: W + alpha / r * B A, copies in place."""
    base = load_file(model / "model.safetensors")
    tensors, config = (
        load_file(out / "adapter_model.safetensors"),
        read(out / "adapter_config.json"),
    )
    scale = config["lora_alpha"] / config["r"]
    for name in list(base):
        path = name.removesuffix(".weight")
        if f"{PREFIX}{path}.lora_A.weight" in tensors:
            A, B = (tensors[f"{PREFIX}{path}.lora_{x}.weight"] for x in "AB")
            base[name] = base[name] + scale * (B @ A)
        if f"{PREFIX}{name}" in tensors:
            base[name] = tensors[f"{PREFIX}{name}"]
    for key in tensors.keys() - {PREFIX + n for n in base}:
        if ".lora_" not in key:
            base[key.removeprefix(PREFIX)] = tensors[key]
    return base


def test_t20_a_qlora_adapter_is_merged_onto_the_base_that_it_saw(tmp_path):
    # 64 x 64: whole blocks of 64 in a row
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = write_model(tmp_path / "model", **sizes)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(8))
    settings = FULL | {"load_in_4bit": True, "max_steps": 3}
    train(**settings, model=model, dataset=rows, output_dir=tmp_path / "out", eval_dataset=rows)
    trained = metrics(tmp_path / "out")[-1]["eval_loss"]  # on the 4-bit base, with the adapter
    found = {}
    for base in ("dequant", "16bit"):
        merged(tmp_path / "out", tmp_path / base, base=base)
        still = settings | {"load_in_4bit": False, "learning_rate": 0, "max_steps": 1}
        place = tmp_path / f"{base}-eval"
        train(**still, model=tmp_path / base, dataset=rows, eval_dataset=rows, output_dir=place)
        found[base] = metrics(place)[0]["eval_loss"]
    assert found["dequant"] == pytest.approx(trained, abs=1e-4)
    assert abs(found["16bit"] - trained) > 1e-3
    outcome = call("merge", flags(adapter=tmp_path / "out", output_dir=tmp_path / "auto"))
    assert "decoded from 4 bits" in outcome.out  # and it says which


def test_t21_tied_matrices_stay_one_through_training_and_merging(tmp_path):
    model = write_model(tmp_path / "model", tie_word_embeddings=True)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(8))
    train(
        **FULL, model=model, dataset=rows, output_dir=tmp_path / "out", max_steps=3,
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    ours = merged(tmp_path / "out", tmp_path / "merged")
    tensors = live(model, tmp_path / "out")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    old = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(tensors["model.embed_tokens.weight"], old)
    untied = parse_model_config(CONFIG | {"tie_word_embeddings": False})
    wanted = logits({}, tensors, make_tokens([ids(16)]), Compute(untied))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    tied = read(tmp_path / "merged" / "config.json")["tie_word_embeddings"]
    keys = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert tied == ("lm_head.weight" not in keys)


def test_t22_token_ids_without_an_embedding_row_are_refused(given, tmp_path):
    """A tokenizer that was given more tokens than the model has rows."""
    model = write_model(tmp_path / "model", vocab_size=300)
    outcome = call("train", flags(**given | {"model": model}, output_dir=tmp_path / "out"))
    assert outcome.code == 2 and "300 rows" in outcome.err and "own tokenizer" in outcome.err
    # and ids that came with the rows
    path = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [5, 6, 384]}])
    outcome = call("train", flags(**given | {"dataset": path}, output_dir=tmp_path / "out"))
    assert outcome.code == 2 and "token id 384" in outcome.err and "384 rows" in outcome.err


ROPES = {
    "3.0": ({"rope_theta": 500000.0}, None),
    "3.1": ({"rope_theta": 500000.0}, 8.0),
    "3.2": ({"rope_theta": 500000.0}, 32.0),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
def test_t23_rope_frequencies_are_those_of_the_closed_form(kind, spelling):
    raw, factor = dict(ROPES[kind][0]), ROPES[kind][1]
    if factor:
        scaling = {
            "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        if spelling == "rope_parameters":
            raw = {"rope_parameters": {"rope_type": "llama3", **raw, **scaling}}
        else:
            raw["rope_scaling"] = {spelling: "llama3", **scaling}
    found, attention = rope_inverse_frequencies(parse_rope(raw, 131072), 128, 131072)
    wanted = []
    for i in range(64):
        frequency = 500000.0 ** (-2 * i / 128)
        turns = 8192 * frequency / (2 * math.pi)
        if factor and turns < 1:
            frequency /= factor
        elif factor and turns < 4:
            ramp = (turns - 1) / 3
            frequency = (1 - ramp) * frequency / factor + ramp * frequency
        wanted.append(frequency)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-6, atol=0)
    assert attention == 1.0


def test_t23_an_unknown_rope_type_is_refused():
    from minisft.config.errors import UserError

    with pytest.raises(UserError, match="su"):
        parse_rope({"rope_scaling": {"type": "su", "factor": 2.0}}, 4096)


def test_t24_the_adapter_file_means_what_peft_takes_it_to_mean(given, model, tmp_path):
    """Names and scale are read here by the letter of PEFT's format, not by our reader."""
    train(**given, lora_alpha=12, output_dir=tmp_path / "out", max_steps=3)
    config = read(tmp_path / "out" / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shapes = parse_model_config(CONFIG).linear_paths()
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        f"base_model.model.{path}.lora_{x}.weight": ((4, i) if x == "A" else (o, 4))
        for path, (o, i) in shapes.items()
        for x in "AB"
    }
    compute = Compute(load_model_config(model))
    tokens = make_tokens([ids(16)])
    merged_by_hand = logits({}, live(model, tmp_path / "out"), tokens, compute)
    base = logits({}, load_file(model / "model.safetensors"), tokens, compute)
    assert (merged_by_hand - base).abs().max() > 0.05
    # what the run itself computes with the adapter: its loss on the rows
    rows = write_rows(tmp_path / "eval.jsonl", pairs(4))
    train(**given, lora_alpha=12, output_dir=tmp_path / "e", max_steps=3, eval_dataset=rows)
    trained = metrics(tmp_path / "e")[-1]["eval_loss"]
    tokenizer = load_tokenizer(model)
    found = tokenize_rows(pairs(4), tokenizer, format=None, max_length=64, source="rows")
    batch = make_micro_batch(found, [0, 1, 2, 3], CPU)
    by_hand = evaluation({}, live(model, tmp_path / "e"), [batch], compute).loss
    assert by_hand == pytest.approx(trained, abs=1e-4)


# ------------------------------------------------------------------------------------- 25 to 27


def test_t25_special_tokens_written_in_a_message_stay_text(tokenizer):
    content = " ".join(SPECIALS) + "<|eot|><|start|>assistant<|end|>\n"
    rows = [
        [{"messages": chat(("user", text), ("assistant", text))}] for text in (content, "plain")
    ]
    control = set(range(len(SPECIALS)))
    hostile, plain = (
        tokenize_rows(r, tokenizer, format=None, max_length=None, source="rows") for r in rows
    )
    counts = [sum(i in control for i in d.input_ids.tolist()) for d in (hostile, plain)]
    assert counts[0] == counts[1] == 7  # bos, and start, end, eot of two turns
    decoded = tokenizer.backend.decode(hostile.input_ids.tolist(), skip_special_tokens=False)
    assert decoded.count("<|pad|>") == 2


def test_t26_tokens_kept_from_before_are_not_taken_for_others(given, model, tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": TALK}] * 4)
    settings = given | {"dataset": path, "dataset_cache_dir": tmp_path / "cache", "max_steps": 1}
    count = 0

    def hash_of(**changes):
        nonlocal count
        count += 1
        outcome = train(**settings | changes, output_dir=tmp_path / f"out-{count}")
        return read(tmp_path / f"out-{count}" / "run.json")["data_hash"], outcome.out

    first, said = hash_of()
    again, said_again = hash_of()
    assert first == again and "cache" in said_again and "tokenised rows of" not in said
    hashes = {first, hash_of(max_length=24)[0], hash_of(assistant_only_loss=True)[0]}
    other = shutil.copytree(model, tmp_path / "model")
    fields = read(other / "tokenizer_config.json")
    fields["chat_template"] = TEMPLATE.replace("| trim", "| upper")
    (other / "tokenizer_config.json").write_text(json.dumps(fields))
    hashes.add(hash_of(model=other)[0])
    path.write_text(path.read_text().replace("lazy", "lazi", 1))
    hashes.add(hash_of()[0])
    assert len(hashes) == 5


def test_t27_a_run_that_changes_nothing_is_an_error(given, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"].zero_()  # no gradient comes through
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    outcome = call(
        "train", flags(**given | {"model": broken}, output_dir=tmp_path / "out", max_steps=2)
    )
    assert outcome.code == 3 and "changed no trained weight" in outcome.err
    for wrong in ({"max_steps": 0}, {"num_train_epochs": 0}):
        assert call("train", flags(**given | wrong, output_dir=tmp_path / "none")).code == 2


def test_every_trap_has_a_test_and_a_mutant():
    from pathlib import Path

    from mutants import MUTANTS, occurrences

    source = Path(__file__).read_text()
    numbers = {int(n) for n in re.findall(r"def test_t(\d\d)_", source)}
    assert numbers == {m.trap for m in MUTANTS} == set(range(1, 28))
    for mutant in MUTANTS:
        assert occurrences(mutant) == 1, mutant
    assert not [p for p in tree(Path(__file__).parent) if p.endswith(".orig")]
