"""NEFTune's noise: its distribution, and what it depends on."""

import math

import torch
from tiny_llama import all_rows, random_dataset

from minisft.nn import module_key, random_bits
from minisft.variants.neftune import embedding_noise


def noise(lengths, step=0, alpha=5.0, seed=0):
    batch = all_rows(random_dataset(lengths), dropout=True, step=step, seed=seed)
    (micro,) = batch.micro_batches
    bits = random_bits(micro.tokens.dropout_keys_T, module_key("neftune"), 64)
    lengths = micro.tokens.documents.lengths
    return embedding_noise(bits, lengths, alpha, torch.float32), lengths


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
