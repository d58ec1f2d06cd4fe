"""Which flash attention runs: torch's own, or a package that the user has installed."""

import sys
import types

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl, register_flash_attention_impl

from minisft.config.errors import UserError
from minisft.session.torch_switches import flash_attention

GPU = torch.device("cuda")


class Handle:
    def remove(self):
        pass


@pytest.fixture
def installed(monkeypatch):
    """A module of the package's name, and its registration with torch."""
    from torch.nn.attention import _registry

    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash"))
    before = dict(_registry._FLASH_ATTENTION_IMPLS)
    register_flash_attention_impl("FA3", register_fn=Handle)
    yield
    _registry._FLASH_ATTENTION_IMPLS.update(before)


def test_the_package_is_torch_s_flash_attention_while_the_run_lasts(installed):
    with pytest.raises(ZeroDivisionError), flash_attention("flash_attention_3", GPU):
        assert current_flash_attention_impl() == "FA3"
        raise ZeroDivisionError
    assert current_flash_attention_impl() is None
    with flash_attention("auto", GPU):
        assert current_flash_attention_impl() is None


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_4"])
def test_a_package_that_is_not_there_is_named(name):
    missing = pytest.raises(UserError, match=f"{name}: its package flash_attn.* cannot be used")
    with missing, flash_attention(name, GPU):
        raise AssertionError("it must not start")


def test_a_cpu_has_none(installed):
    refused = pytest.raises(UserError, match="needs a CUDA GPU, but the device is cpu")
    with refused, flash_attention("flash_attention_3", torch.device("cpu")):
        raise AssertionError("it must not start")
