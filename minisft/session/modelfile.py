"""An Ollama Modelfile: where the weights are, the chat template in Go's syntax, the stop tokens."""

from __future__ import annotations

from minisft.config.errors import UserError
from minisft.config.model import ModelConfig
from minisft.session.generate import stop_ids
from minisft.text.chat import render
from minisft.text.tokenizer import Tokenizer, export_tokenizer_files

# Stand-ins for what a template is given; a template may trim them, but does not know them.
_SYSTEM, _USER, _ANSWER = "\u27e8system\u27e9", "\u27e8user\u27e9", "\u27e8answer\u27e9"


def serving_files(source: str, tokenizer: Tokenizer, cfg: ModelConfig) -> dict[str, bytes]:
    """Name -> content of the files that serve a result: tokenizer, chat template, Modelfile.

    source: as `modelfile` takes it.
    """
    return export_tokenizer_files(tokenizer) | {
        "Modelfile": modelfile(source, tokenizer, cfg).encode()
    }


def modelfile(source: str, tokenizer: Tokenizer, cfg: ModelConfig) -> str:
    """The text of a Modelfile. source: its FROM line (and ADAPTER), relative to the file.

    Without a chat template, or with one that treats turns otherwise than by text before and after
    them, the prompt is passed on as it is and a comment says so.
    """
    lines = [source]
    template = go_template(tokenizer)
    if template is None:
        lines.append("# No chat template could be carried over: give the whole text as the prompt.")
        template = "{{ .Prompt }}"
    lines.append(f'TEMPLATE """{template}"""')
    names = sorted(tokenizer.backend.id_to_token(i) or "" for i in stop_ids(tokenizer, cfg))
    lines += [f'PARAMETER stop "{name}"' for name in names if name and '"' not in name]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Tokenizer) -> str | None:
    """The chat template with .System, .Prompt and .Response for one turn, or None.

    Ollama repeats it turn by turn and puts the beginning-of-text token itself.
    """

    def text(*messages: tuple[str, str], prompt: bool) -> str:
        assert tokenizer.chat_template is not None
        return render(
            tokenizer.chat_template,
            [{"role": role, "content": content} for role, content in messages],
            special_tokens=tokenizer.special_tokens,
            add_generation_prompt=prompt,
        ).removeprefix(tokenizer.special_tokens.get("bos_token", ""))

    if not tokenizer.chat_template:
        return None
    user, answer = ("user", _USER), ("assistant", _ANSWER)
    try:
        before, after = text(user, prompt=True).split(_USER)
        open_turn, end = text(user, answer, prompt=False).split(_ANSWER)
    except (UserError, ValueError):
        return None
    # A space between the prompt and an answer is left to the model, as in generation.
    if open_turn.rstrip() != (before + _USER + after).rstrip():
        return None
    head = before
    try:
        with_system = text(("system", _SYSTEM), user, prompt=True)
        opening, rest = with_system.split(_SYSTEM)
        middle, rest = rest.split(_USER)
        if rest == after:
            head = (
                f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{middle}"
                f"{{{{ else }}}}{before}{{{{ end }}}}"
            )
    except (UserError, ValueError):  # a template without a system role
        opening = middle = ""
    literal = before + after + end + opening + middle
    if "{{" in literal or '"""' in literal:
        return None
    return f"{head}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"
