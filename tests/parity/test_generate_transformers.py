"""Greedy answers equal to transformers' generate, token for token, for every RoPE type."""

import pytest
import torch
from runs import write_model
from safetensors.torch import load_file, save_file

from minisft.files.weights import load_model_config, open_checkpoint, stream_weights
from minisft.llama import Compute
from minisft.session.generate import InferenceModel, generate

transformers = pytest.importorskip("transformers")

THETA = {"rope_theta": 10000.0}
ROPES = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 3.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
        **THETA,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        **THETA,
    },
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [16] * 12]


@pytest.mark.parametrize("name", ROPES)
def test_greedy_answers_equal_transformers(name, tmp_path):
    """Beyond max_position_embeddings too, where `dynamic` stretches what is not cached yet."""
    directory = write_model(tmp_path, rope_parameters=ROPES[name], max_position_embeddings=16)
    weights = load_file(directory / "model.safetensors")
    for key in weights:
        if "q_proj" in key or "k_proj" in key:  # sharp attention, so that positions decide
            weights[key] *= 6
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    weights, compute = dict(stream_weights(checkpoint)), Compute(checkpoint.cfg)
    model = InferenceModel({}, weights, compute, torch.device("cpu"))
    got = generate(model, PROMPTS, max_new_tokens=20, stop_ids=set())
    for prompt, answer in zip(PROMPTS, got, strict=True):
        want = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert answer == want[0, len(prompt) :].tolist()
