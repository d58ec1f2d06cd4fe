"""The model card of an adapter: README.md with front matter for the hub."""

from __future__ import annotations

from typing import Any

import yaml

from minisft.config.errors import UserError
from minisft.files.quant_state import OURS

CARD_NAME = "README.md"
_USE = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/directory")
```
"""
_FOUR_BIT_USE = """Trained on the base in 4 bits (NF4, double quantisation). To load it on the same:

```python
from peft import AutoPeftModelForCausalLM
from transformers import BitsAndBytesConfig

model = AutoPeftModelForCausalLM.from_pretrained(
    "path/to/this/directory",
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
)
```
"""
_STORED_USE = "Trained on the base as it is stored, in 4 bits ({kind}).\n\n" + _USE


def model_card(facts: dict[str, Any], base_4bit: str = "") -> str:
    """Return README.md of an adapter: YAML front matter for the hub, then the facts as tables.

    facts["base_model"] (a hub id or path) is required. Other scalars, such as data_hash, form the
    table "Run"; a dict, such as config or losses, becomes a table of its own under its key.
    base_4bit: the quantisation of the base (`quant_state.kinds`), "" if it is not in 4 bits.
    Raises UserError if base_model is missing.
    """
    base = facts.get("base_model")
    if not base:
        raise UserError("model card: base_model is missing; give the hub id of the base model")
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{base}", "lora", "sft", "minisft"],
    }
    if base_4bit == OURS:
        use = _FOUR_BIT_USE
    else:
        # A base that is stored in 4 bits has a quantization_config in its own config.json.
        use = _STORED_USE.format(kind=base_4bit) if base_4bit else _USE
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# LoRA adapter for {' '.join(str(base).split())}\n",
        "Trained by supervised fine-tuning with minisft.\n",
        use,
    ]
    scalars = {k: v for k, v in facts.items() if not isinstance(v, dict) and k != "base_model"}
    tables = {"run": scalars} | {k: v for k, v in facts.items() if isinstance(v, dict)}
    sections += [_table(title, rows) for title, rows in tables.items() if rows]
    return "\n".join(sections)


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |\n" for key, value in rows.items()]
    heading = title.replace("_", " ").capitalize()
    return f"## {heading}\n\n| | |\n|---|---|\n" + "".join(lines)


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
