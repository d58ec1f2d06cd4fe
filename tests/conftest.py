"""What every test shares: no network, one thread, and a tiny Llama on disk.

Being here puts tests/ on the import path, so that tests in its folders may import `runs`,
`tiny_llama` and `tiny_tokenizer`.
"""

import os
import signal
import sys
from pathlib import Path

# The checkout itself is what is tested, whatever is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from runs import write_model

# Triton's kernels run in its interpreter where there is no GPU, whichever test imports them first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts the tests in the background leaves SIGINT ignored, and every child with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tensors this small are slower on two threads than on one, and far slower where cores are shared.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory) -> Path:
    """A random Llama of two layers (config.json, safetensors) with a byte-level tokenizer.

    Shared by the whole session: read it, never write into it.
    """
    return write_model(tmp_path_factory.mktemp("llama"))
