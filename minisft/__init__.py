"""Supervised fine-tuning of Llama models as pure functions.

`train(TrainConfig(...))` is the whole program; `minisft.llama` is the forward pass to read.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisft.config.errors import UserError
    from minisft.config.train import TrainConfig
    from minisft.run import TrainOutput, train

__all__ = ["TrainConfig", "TrainOutput", "UserError", "train"]

# In a checkout the folder kernels/ is next to this one; a wheel holds it as minisft/kernels/.
# Its import name is minisft.kernels in both, because PyPI has a package named kernels.
_checkout = Path(__file__).parents[1]
if (_checkout / "kernels" / "nf4_lora_linear").is_dir():
    __path__.append(str(_checkout))

_HOMES = {
    "UserError": "minisft.config.errors",
    "TrainConfig": "minisft.config.train",
    "TrainOutput": "minisft.run",
    "train": "minisft.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that `import minisft.step` does not load `run`."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minisft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
