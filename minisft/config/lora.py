"""`LoraConfig`: the settings of one LoRA adapter, under PEFT's names."""

import math
import re
from dataclasses import dataclass

from minisft.config.errors import UserError
from minisft.config.model import LINEAR_NAMES


@dataclass(frozen=True)
class LoraConfig:
    """Settings of one LoRA adapter under PEFT's names: rank, scale, adapted modules."""

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = LINEAR_NAMES  # suffixes, "all-linear", or one "re:PATTERN"
    modules_to_save: tuple[str, ...] = ()  # embed_tokens, lm_head: copies are trained
    use_dora: bool = False
    init_lora_weights: str = "default"  # or gaussian, pissa, pissa_niter_N, olora
    rank_pattern: tuple[tuple[str, int], ...] = ()  # name or regular expression -> rank
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] = ()  # () means all
    exclude_modules: tuple[str, ...] = ()  # names and suffixes, or one "re:PATTERN"
    trainable_token_indices: tuple[int, ...] = ()  # trained rows of the embedding
    lora_embeddings: bool = False  # an adapter on embed_tokens

    @property
    def splits_weights(self) -> bool:
        """Whether A and B start as part of the weight, which is then subtracted from the base."""
        return self.init_lora_weights.startswith(("pissa", "olora"))

    @property
    def scaling(self) -> float:
        """LoRA scale of modules that match no rank_pattern or alpha_pattern."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def rank_of(self, path: str) -> int:
        """Return a module's rank: that of the first rank_pattern key that matches path, else r."""
        return next((r for key, r in self.rank_pattern if matches(key, path)), self.r)

    def scaling_of(self, path: str) -> float:
        """Return the LoRA scale of the module at a path, from its own rank and alpha."""
        alphas = (a for key, a in self.alpha_pattern if matches(key, path))
        alpha, r = next(alphas, self.lora_alpha), self.rank_of(path)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def matches(key: str, path: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern matches a module path, as in PEFT.

    Raises UserError for a malformed regular expression.
    """
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except re.error as e:
        raise UserError(f"pattern {key!r} is not a regular expression: {e.msg}") from None
