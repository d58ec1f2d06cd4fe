"""Readers of bytes from elsewhere: what fuzzing found, and properties over generated inputs."""

import json
from pathlib import Path

import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisft.config.errors import UserError
from minisft.files.safetensors import iter_tensors, read_header, save_file

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SEEDS = fuzz.seeds()
FINDINGS = sorted(Path(__file__).with_name("findings").glob("*-*-*"))


@pytest.mark.parametrize("path", FINDINGS, ids=lambda p: p.name)
def test_f49_what_fuzzing_once_found_ends_in_one_line(path):
    with pytest.raises(UserError):
        fuzz.READERS[path.name.split("-")[0]](path.read_bytes())
    fuzz.check(path.name.split("-")[0], path.read_bytes())


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_sound_inputs_are_read(reader):
    """Else every property below would hold for a reader that refuses all."""
    for value in SEEDS[reader]:
        if reader == "jsonl":
            data = b"\n".join(json.dumps(row).encode() for row in value)
        else:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if reader == "jsonl" and len(value) > 1:
            continue  # of two formats
        fuzz.READERS[reader](data)


@pytest.mark.parametrize("reader", fuzz.READERS)
@QUICK
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(reader, data):
    fuzz.check(reader, data)


@pytest.mark.parametrize("reader", [r for r in fuzz.READERS if r != "template"])
@QUICK
@given(data=st.binary(min_size=4, max_size=14))
def test_any_edit_of_a_sound_input_is_read_or_refused(reader, data):
    fuzz.check(reader, fuzz.case(reader, b"\x00" + data, SEEDS[reader]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@pytest.mark.parametrize("reader", ["config", "quant_state", "adapter", "jsonl", "yaml"])
@QUICK
@given(value=JSON)
def test_any_json_is_read_or_refused(reader, value):
    fuzz.check(reader, json.dumps(value).encode())


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(["float32", "float16", "bfloat16", "int8", "uint8", "int64", "bool"]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=5,
)


@QUICK
@given(
    specs=TENSORS, metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)
)
def test_what_is_written_is_what_is_read(tmp_path, specs, metadata):
    """Any names, dtypes and shapes, by our reader and by the library's."""
    from safetensors.torch import load_file

    tensors = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
        for name, (dtype, shape) in specs.items()
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata)
    assert read_header(path).metadata == metadata
    for found in (dict(iter_tensors(path)), load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)
        assert all(found[k].dtype == tensors[k].dtype for k in tensors)


@QUICK
@given(size=st.integers(0, 199))
def test_every_cut_of_a_file_is_refused(tmp_path, size):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(8.0), "b": torch.ones(3, 2)}, path, {"format": "pt"})
    data = path.read_bytes()
    path.write_bytes(data[: size * len(data) // 200])
    with pytest.raises(UserError, match=r"truncated|not safetensors|not a JSON"):
        read_header(path)
