"""Faults 36 to 50: files that are damaged, lie, or are meant to harm."""

import ast
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch
from runs import ROOT, call, flags, pairs, read, train, tree, write_model, write_rows
from safetensors.torch import load_file, save_file

from minisft.config.errors import UserError
from minisft.files.safetensors import read_header
from minisft.text import chat, sandbox

SMALL = {"lora_r": 2, "max_steps": 1, "max_length": 64}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    write_model(directory / "model")
    write_rows(directory / "rows.jsonl", pairs(4))
    return directory


@pytest.fixture
def place(original, tmp_path):
    """A directory with a model and rows that may be spoilt."""
    shutil.copytree(original, tmp_path / "place")
    return tmp_path / "place"


def argv(place, **changes):
    given = {"model": place / "model", "dataset": place / "rows.jsonl", "output_dir": place / "out"}
    return flags(**given | SMALL | changes)


def refused(place, *texts, **changes):
    """The run ends with exit code 2 and one line that holds these texts; nothing was written."""
    outcome = call("train", argv(place, **changes))
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert outcome.err.startswith("error: ") and "Traceback" not in outcome.err
    assert all(text in outcome.err for text in texts), outcome.err
    out = place / "out"
    assert not out.exists() or os.listdir(out) == [".lock"]
    return outcome.err


def edit(path, **changes):
    path.write_text(json.dumps({k: v for k, v in (read(path) | changes).items() if v is not None}))


def shards(place, names):
    """The weights as files of these names with an index."""
    model = place / "model"
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    keys = sorted(weights)
    weight_map = {key: names[i % len(names)] for i, key in enumerate(keys)}
    for name in names:
        part = {k: weights[k] for k in keys if weight_map[k] == name}
        save_file(part, model / name, {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


# ----------------------------------------------------------------------------- weights and config

TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_f36_a_truncated_or_missing_shard_is_named(place):
    model = shards(place, TWO)
    whole = (model / TWO[1]).read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        (model / TWO[1]).write_bytes(whole[:size])
        refused(place, TWO[1], "truncated", "download it again")
    (model / TWO[1]).unlink()
    refused(place, f"{TWO[1]} is missing", "download it again")
    (model / TWO[1]).write_bytes(whole)
    assert call("train", argv(place)).code == 0


def changed(name, tensor):
    return lambda weights: (
        weights.update({name: tensor}) if tensor is not None else weights.pop(name)
    )


Q = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {
    "wrong_shape": (changed(Q, torch.zeros(32, 31)), [Q, "(32, 31)", "(32, 32)"]),
    "missing": (changed(Q, None), [f"{Q} is missing"]),
    "extra": (changed("model.layers.7.mlp.up_proj.weight", torch.zeros(48, 32)), ["layers.7"]),
    "fp8": (changed(Q, torch.zeros(32, 32).to(torch.float8_e4m3fn)), [Q, "float8_e4m3fn"]),
    "int8": (changed(Q, torch.zeros(32, 32, dtype=torch.int8)), [Q, "int8"]),
    "float64": (changed(Q, torch.zeros(32, 32, dtype=torch.float64)), [Q, "float64"]),
}


@pytest.mark.parametrize("kind", [k for k in TENSORS if k in ("wrong_shape", "missing", "extra")])
def test_f37_tensors_that_do_not_fit_the_config_are_named(place, kind):
    change, texts = TENSORS[kind]
    weights = load_file(place / "model" / "model.safetensors")
    change(weights)
    save_file(weights, place / "model" / "model.safetensors")
    refused(place, *texts, "another model's config.json?")


def test_f37_another_architecture_is_refused(place):
    edit(
        place / "model" / "config.json", model_type="mistral", architectures=["MistralForCausalLM"]
    )
    refused(place, "model_type is 'mistral'", "Use a Llama checkpoint")


@pytest.mark.parametrize("kind", ["fp8", "int8", "float64"])
def test_f38_another_number_format_is_named(place, kind):
    change, texts = TENSORS[kind]
    weights = load_file(place / "model" / "model.safetensors")
    change(weights)
    save_file(weights, place / "model" / "model.safetensors")
    refused(place, *texts)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_f38_another_quantisation_is_named(place, method):
    edit(place / "model" / "config.json", quantization_config={"quant_method": method})
    refused(place, f"quant_method={method!r}", "Use the unquantised base")


LIES = {
    "heads": {"num_attention_heads": 8},
    "kv_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 16},
    "layers": {"num_hidden_layers": 3},
    "fewer_layers": {"num_hidden_layers": 1},
    "hidden": {"hidden_size": 64},
    "intermediate": {"intermediate_size": 96},
    "vocabulary": {"vocab_size": 385},
    "bias": {"attention_bias": True},
    "a_billion_layers": {"num_hidden_layers": 10**9},
    "a_huge_vocabulary": {"vocab_size": 10**30},
    "negative": {"num_key_value_heads": -2},
    "rope_type": {"rope_parameters": {"rope_type": "longrope"}},
    "rope_without_factor": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    "rope_nan": {"rope_parameters": {"rope_type": "linear", "factor": float("nan")}},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "eps": {"rms_norm_eps": float("nan")},
    "activation": {"hidden_act": "gelu"},
    "eos": {"eos_token_id": "</s>"},
    "positions": {"max_position_embeddings": 0},
}


@pytest.mark.parametrize("kind", LIES)
def test_f39_a_config_that_lies_is_refused_at_once(place, kind):
    edit(place / "model" / "config.json", **LIES[kind])
    started = time.perf_counter()
    refused(place, str(place / "model"))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"hidden_size": ' + "9" * 5000 + "}", "\x00", '{"a": 1, "a"}', "NaN"]
)
def test_f39_a_config_that_is_no_json_is_refused(place, text):
    (place / "model" / "config.json").write_text(text)
    refused(place, "config.json")


def test_f40_more_token_ids_than_the_embedding_has_rows(place):
    write_model(place / "model", vocab_size=200)
    refused(place, "200 rows", "use the model's own tokenizer")


TYPOS = {
    "--learning-rte": "--learning-rate", "--lr": "--learning-rate", "--lora_rank": "--lora-r",
    "--batch-size": "--per-device-train-batch-size", "--epochs": "--num-train-epochs",
    "--max-seq-length": "--max-length", "--outputdir": "--output-dir", "--modle": "--model",
    "--data-set": "--dataset", "--seeed": "--seed", "--warmup-ratio": "--warmup-steps",
    "--gradient-acumulation-steps": "--gradient-accumulation-steps", "--pack": "--packing",
    "--lora-alhpa": "--lora-alpha", "--save-step": "--save-steps", "--resume":
    "--resume-from-checkpoint", "--target-module": "--target-modules", "--wieght-decay":
    "--weight-decay", "--full-finetune": "--full-finetuning", "--evaldataset": "--eval-dataset",
}  # fmt: skip


def test_f41_twenty_typos_are_told_with_the_right_name(place):
    assert len(TYPOS) == 20
    from minisft.config.train import TrainConfig

    known = {f"--{name.replace('_', '-')}" for name in TrainConfig.__dataclass_fields__}
    for typo, right in TYPOS.items():
        assert right in known
        outcome = call("train", [*argv(place), typo, "1"])
        # Some are another program's names, and taken for ours: then the value is what is wrong.
        if typo.removeprefix("--").replace("-", "_") in accepted_names():
            continue
        assert outcome.code == 2 and f"unknown flag {typo}; did you mean {right}?" in outcome.err


def accepted_names():
    """Hugging Face's other names, where there is a table of them."""
    files = [ROOT / "minisft" / "config" / name for name in ("names.py", "names.toml")]
    text = "".join(path.read_text() for path in files if path.exists())
    found = re.findall(r'^\s*"?([a-z_]+)"?\s*[:=] ', text, re.MULTILINE)
    assert len(found) > 50, "where is the table of names?"
    return set(found)


def test_f41_unknown_yaml_keys_and_wrong_types_are_told(place):
    for text, told in (
        ("learning_rte: 1\n", "did you mean learning_rate?"),
        ("lr: 1\n", "learning_rate"),
        ("lora_r: many\n", "expected int"),
        ("packing: 3\n", "expected bool"),
        ("!!python/object/apply:os.system ['touch pwned']\n", "malformed YAML"),
    ):
        (place / "run.yaml").write_text(text)
        outcome = call("train", [*argv(place), "--config", str(place / "run.yaml")])
        if told == "learning_rate" and outcome.code == 0:
            continue
        assert outcome.code == 2 and told in outcome.err, (text, outcome.err)
    assert not Path("pwned").exists()
    twice = call("train", [*argv(place), "--config", "a.yaml", "--config=b.yaml"])
    assert twice.code == 2 and "--config is given 2 times (a.yaml, b.yaml)" in twice.err


CONTRADICTIONS = {
    "packing": ({"packing_strategy": "wrapped"}, "--packing-strategy wrapped has no effect"),
    "lora": ({"full_finetuning": True}, "--lora-r 2 has no effect with --full-finetuning"),
    "copies": (
        {"full_finetuning": True, "modules_to_save": "lm_head", "lora_r": 16},
        "--modules-to-save",
    ),
    "eval_steps": ({"eval_steps": 5}, "--eval-steps 5 has no effect"),
    "warmup": (
        {"warmup_steps": 3, "lr_scheduler_type": "constant"},
        "--warmup-steps 3.0 has no effect with --lr-scheduler-type constant",
    ),
    "over": (
        {"overwrite_output_dir": True, "resume_from_checkpoint": "auto"},
        "--overwrite-output-dir has no effect with --resume-from-checkpoint",
    ),
    "eval": ({"eval_strategy": "steps"}, "needs --eval-dataset"),
    "generate": ({"eval_generate": 3}, "--eval-dataset"),
    "revision": ({"revision": "main"}, "--revision main has no effect on a local directory"),
    "split": ({"dataset_split": "test"}, "split"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_f42_settings_that_contradict_each_other_are_refused(place, kind):
    changes, text = CONTRADICTIONS[kind]
    refused(place, text, **changes)


# -------------------------------------------------------------------------------------- security

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_f43_pickles_are_never_read(place):
    """Pickles under every name that other programs unpickle, next to the files that are read."""
    train(**SMALL | {"max_steps": 2, "save_steps": 1}, **base(place), output_dir=place / "out")
    canary = place / "canary"
    names = (
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin",
        "adapter_model.bin", "pytorch_model.bin", "tokenizer.pkl", "trainer_state.pt",
        "consolidated.00.pth",
    )  # fmt: skip
    shutil.rmtree(place / "out" / "checkpoint-2")
    (place / "out" / "train_output.json").unlink()
    for directory in (place / "model", place / "out", place / "out" / "checkpoint-1"):
        for name in names:
            (directory / name).write_bytes(pickle.dumps(Canary(canary)))
    train(
        **SMALL | {"max_steps": 2}, **base(place), output_dir=place / "out",
        resume_from_checkpoint="auto",
    )  # fmt: skip
    asked = call(
        "generate", ["--adapter", str(place / "out"), "--prompt", "a", "--max-new-tokens", "2"]
    )
    assert asked.code == 0, asked.err
    assert not canary.exists()
    with pytest.raises(FileExistsError):  # the canary does sing
        canary.mkdir()
        pickle.loads((place / "model" / "optimizer.pt").read_bytes())
    canary.rmdir()
    (place / "model" / "model.safetensors").unlink()
    outcome = call("train", argv(place, output_dir=place / "other"))
    assert outcome.code == 2 and "is a pickle, which is never read" in outcome.err
    (place / "out" / "adapter_model.safetensors").unlink()
    asked = ask(place / "out")
    assert asked.code == 2 and "adapter_model" in asked.err and not canary.exists()


def ask(adapter):
    return call("generate", flags(adapter=adapter, prompt="a", max_new_tokens=2))


def base(place):
    return {"model": place / "model", "dataset": place / "rows.jsonl"}


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "model.bin", "", "a\\b"],
)
def test_f44_an_index_that_leaves_the_directory_is_refused(place, name):
    model = shards(place, TWO)
    index = read(model / "model.safetensors.index.json")
    index["weight_map"][Q] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(place, "model.safetensors.index.json", repr(name), "expected a file name")


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {}}, "x", {"weight_map": {Q: 3}}]
)
def test_f44_an_index_of_another_shape_is_refused(place, index):
    model = shards(place, TWO)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(place, "model.safetensors.index.json")


def test_f44_a_manifest_that_leaves_the_checkpoint_is_refused(place):
    train(**SMALL, **base(place), output_dir=place / "out")
    path = place / "out" / "checkpoint-1" / "manifest.json"
    manifest = read(path)
    manifest["files"]["../../rows.jsonl"] = "0" * 64
    path.write_text(json.dumps(manifest))
    outcome = call(
        "train", argv(place, resume_from_checkpoint=place / "out" / "checkpoint-1", max_steps=2)
    )
    assert outcome.code == 2 and "outside the directory" in outcome.err


TEMPLATES = {
    # 45: Python's internals
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].mkdir('CANARY') }}",
    "init": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "namespace": "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}{{ messages.clear() }}",
    "self": "{{ self._TemplateReference__context.environment }}",
    # 46: time and memory
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "nested": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "repeat": "{{ 'a' * 100000000 }}",
    "doubling": "{% set ns = namespace(a='aa') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "joining": "{% set ns = namespace(a='aa') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "products": "{% set ns = namespace(a=7) %}{% for i in range(40) %}"
    "{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "pad": "{{ '%1000000000d' % 1 }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "replace": "{{ ('a' * 9000000).replace('a', 'a' * 9000000) }}",
    "join_list": "{{ ('a' * 9000000).join(['b'] * 1000) }}",
    "translate": "{{ ('a' * 9000000).translate({97: 'a' * 9000000}) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10000000) }}",
    "format_width": "{{ '{:1000000000}'.format(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "filter_center": "{{ 'a' | center(1000000000) }}",
    "filter_indent": "{{ ('\\n' * 5000000) | indent(1000) }}",
    "filter_replace": "{{ ('a' * 9000000) | replace('a', 'a' * 9000000) }}",
    "filter_join": "{{ (['a'] * 9000000) | join('a' * 9000000) }}",
    "filter_batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "filter_wrap": "{{ ('a ' * 4000000) | wordwrap(1, wrapstring='b' * 9000000) }}",
    "filter_json": "{{ [[[1]]] | tojson(indent=100000000) }}",
    "filter_list": "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "split": "{% for i in range(1000) %}{% set x = ('a ' * 4000000).split(' ') %}{% endfor %}",
    # 47: the disk
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends '/etc/passwd' %}",
}
# Attributes that the sandbox answers with nothing.
BLANK = {
    "attr_filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "lipsum": "{{ lipsum.__globals__ }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_f45_f46_f47_a_hostile_template_is_refused_in_bounded_time(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)  # ten, for whoever waits
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"^chat template"):
        chat.render(TEMPLATES[kind], CHAT, special_tokens={})
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB
    assert os.listdir(tmp_path) == []


def test_f46_a_name_given_twice_is_said_as_the_template_has_it():
    """Jinja takes it; the Python that it makes of the template is refused."""
    with pytest.raises(UserError, match=r"^chat template: duplicate argument 'x' .*; correct the"):
        chat.render("{% macro f(x, x) %}{% endmacro %}", CHAT, special_tokens={})


@pytest.mark.parametrize("kind", BLANK)
def test_f45_what_a_template_may_not_see_is_blank(kind):
    assert chat.render(f"<{BLANK[kind]}>", CHAT, special_tokens={}) == "<>"


@pytest.mark.parametrize("kind", ["globals", "nested", "include"])
def test_f45_f46_f47_a_run_with_such_a_template_ends_with_its_reason(place, kind, monkeypatch):
    monkeypatch.chdir(place)
    edit(place / "model" / "tokenizer_config.json", chat_template=TEMPLATES[kind])
    write_rows(place / "rows.jsonl", [{"messages": CHAT}])
    refused(place, "chat template")
    assert not (place / "CANARY").exists()


def test_f48_auto_map_is_ignored_and_told(place, monkeypatch):
    code = "import os; os.mkdir('CANARY')\nclass A: ...\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (place / "model" / name).write_text(code)
    auto = {"AutoModelForCausalLM": "modeling_evil.A", "AutoConfig": "configuration_evil.A"}
    edit(place / "model" / "config.json", auto_map=auto, trust_remote_code=True)
    tokenizer = {"AutoTokenizer": ["tokenization_evil.A", None]}
    edit(place / "model" / "tokenizer_config.json", auto_map=tokenizer)
    monkeypatch.chdir(place)
    outcome = call("train", argv(place))
    assert outcome.code == 0, outcome.err
    warnings = [line for line in outcome.out.splitlines() if "has an auto_map" in line]
    assert len(warnings) == 2 and "code that comes with a model is never run" in warnings[0]
    assert not (place / "CANARY").exists()
    assert "auto_map" not in (place / "out" / "tokenizer_config.json").read_text()


def header(entries, data=b"", length=None):
    """The bytes of a safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start, stop, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HEADERS = {
    "says_100_mb_and_more": header({}, length=100_000_001),
    "says_8_eib": header({}, length=2**63),
    "overlap": header({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
    "hole": header({"a": tensor(0, 16), "b": tensor(20, 36)}, bytes(36)),
    "hole_at_the_start": header({"a": tensor(4, 20)}, bytes(20)),
    "bytes_behind": header({"a": tensor(0, 16)}, bytes(17)),
    "beyond_the_end": header({"a": tensor(0, 16)}, bytes(15)),
    "same_place": header({"a": tensor(0, 16), "b": tensor(0, 16)}, bytes(16)),
    "negative": header({"a": tensor(-16, 0)}, bytes(16)),
    "backwards": header({"a": tensor(16, 0)}, bytes(16)),
    "shape_of_more": header({"a": tensor(0, 16, (5,))}, bytes(16)),
    "shape_overflows": header({"a": tensor(0, 16, (2**62, 4))}, bytes(16)),
    "shape_negative": header({"a": tensor(0, 16, (-2, -2))}, bytes(16)),
    "shape_true": header({"a": tensor(0, 4, (True,))}, bytes(4)),
    "shape_float": header({"a": tensor(0, 16, (4.0,))}, bytes(16)),
    "unknown_dtype": header({"a": tensor(0, 16, dtype="Q4")}, bytes(16)),
    "dtype_is_a_list": header({"a": tensor(0, 16, dtype=["F32"])}, bytes(16)),
    "entry_is_a_list": header({"a": [1]}),
    "metadata_is_a_list": header({"__metadata__": [1]}),
    "metadata_of_numbers": header({"__metadata__": {"a": 1}}),
    "a_list": header([1]),
    "no_json": header(b"{'a': 1}"),
    "not_utf8": header(b'{"\xff": 1}'),
    "twice": header(b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 16)).encode(),) * 2), bytes(16)),
    "deep": header(b"[" * 100_000),
    "digits": header(b'{"a": ' + b"9" * 5000 + b"}"),
    "empty": b"",
    "seven_bytes": bytes(7),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_f49_a_header_that_lies_is_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[kind])
    started = time.perf_counter()
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_header(path)
    assert time.perf_counter() - started < 2


def test_f49_a_good_header_of_the_same_making_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header({"a": tensor(0, 16), "b": tensor(16, 32, (2, 2))}, bytes(32)))
    assert list(read_header(path).tensors) == ["a", "b"]


HOSTILE = [
    "x; touch CANARY #",
    "$(touch CANARY)",
    "`touch CANARY`",
    "a\nb: c\n# d",
    "a' 'b",
    "--help",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_f50_names_that_a_shell_or_a_card_would_read_are_quoted(place, name, monkeypatch):
    """The command that is printed has the name as one word; the card's front matter stays one."""
    import yaml

    monkeypatch.chdir(place)
    directory = Path(f"./{name}")
    shutil.copytree(place / "model", directory)
    out = Path(f"./out {name}")
    outcome = call("train", argv(place, model=f"./{name}", output_dir=out))
    assert outcome.code == 0, outcome.err
    parts = re.split(r"(?m)^(try it|chat|transformers|vLLM|merge): ", outcome.out)
    printed = dict(zip(parts[1::2], parts[2::2], strict=True))
    words = {kind: shlex.split(text) for kind, text in printed.items()}
    for kind in ("try it", "chat", "merge"):
        assert words[kind][words[kind].index("--adapter") + 1] == str(out)
    assert words["vLLM"][2] == str(place / name)
    assert len(words["transformers"]) == 3 and repr(str(out)) in words["transformers"][2]
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == str(place / name)
    assert set(front) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert not [line for line in card.split("---\n", 2)[2].splitlines() if line in ("# d", "b: c")]
    names = {"model", "rows.jsonl", directory.name, out.name}
    assert {p.name for p in place.iterdir()} == names


# -------------------------------------------------------------------------------------- the matrix


def test_every_fault_has_a_test_of_its_number():
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found |= {int(n) for n in re.findall(r"_?f(\d\d)(?=_)", node.name)}
    assert found == set(range(1, 51))


def test_nothing_in_this_file_was_left_in_the_repository():
    assert not [p for p in tree(ROOT / "tests" / "faults") if "CANARY" in p]
