"""`ModelConfig`: the architecture of a Llama model, and the shapes of its weights."""

from dataclasses import dataclass

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class RopeConfig:
    """RoPE parameters, named as in `rope_parameters` of transformers v5.

    rope_type selects the formula in `minisft.rope.rope_inverse_frequencies`.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a Llama model: config.json with missing fields set to defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = RopeConfig()
    dtype: str | None = None  # of the stored weights: bfloat16, float16, float32; None: unknown
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return {"self_attn.q_proj": (out, in), ...} for the seven linears of one layer."""
        D, I = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, D),
            "self_attn.k_proj": (kv, D),
            "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, q),
            "mlp.gate_proj": (I, D),
            "mlp.up_proj": (I, D),
            "mlp.down_proj": (D, I),
        }

    def linear_paths(self) -> dict[str, tuple[int, int]]:
        """Return module path -> (out_features, in_features) of every linear that LoRA can adapt."""
        return {
            f"model.layers.{i}.{name}": shape
            for i in range(self.num_hidden_layers)
            for name, shape in self.linear_shapes().items()
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor in a checkpoint: Hugging Face key -> shape.

        A tied head has no key, because it shares the embedding's tensor.
        """
        D, V = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
        biased = {n: self.attention_bias for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        biased |= {n: self.mlp_bias for n in ("gate_proj", "up_proj", "down_proj")}
        for i in range(self.num_hidden_layers):
            for name, (out, in_) in self.linear_shapes().items():
                shapes[f"model.layers.{i}.{name}.weight"] = (out, in_)
                if biased[name.split(".")[-1]]:
                    shapes[f"model.layers.{i}.{name}.bias"] = (out,)
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (D,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (D,)
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (V, D)
        return shapes
