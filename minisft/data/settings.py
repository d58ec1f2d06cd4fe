"""Settings that affect the token arrays, and their values for one source."""

from dataclasses import dataclass, replace

from minisft.config.errors import UserError, closest
from minisft.data import formats
from minisft.data.readers import Rows
from minisft.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """Settings that affect the token arrays, and so the cache key.

    Raises UserError if instruction_part or response_part conflicts with another setting.
    """

    format: str | None = None  # one of formats.FORMATS; None detects it
    text_field: str = "text"
    max_length: int | None = None  # tokens
    overlong: str | None = None  # as --overlong; None: truncate, or what the packing does
    packing: str | None = None  # bfd, bfd_split or wrapped; needs a max_length
    completion_only_loss: bool | None = None  # None: if rows have a prompt and a completion
    assistant_only_loss: bool = False
    instruction_part: str = ""  # with response_part: train what follows a response_part,
    response_part: str = ""  # up to the next instruction_part
    skip_bad: bool = False  # drop and count malformed rows instead of stopping

    def __post_init__(self):
        if bool(self.instruction_part) != bool(self.response_part):
            raise UserError(
                "--instruction-part and --response-part belong together: training starts after "
                "a response part and ends at the next instruction part; give both"
            )
        if self.response_part and self.assistant_only_loss:
            raise UserError(
                "--assistant-only-loss and --response-part both say what is trained; give one"
            )


def settings_of_source(settings: Settings, rows: Rows, tokenizer: Tokenizer) -> Settings:
    """Return the settings with format and completion_only_loss resolved for one source.

    Raises UserError if the source's columns do not fit the settings.
    """
    format, field = settings.format, settings.text_field
    if format is None:
        format = formats.detect_format(rows.columns, text_field=field, source=rows.source)
    elif missing := formats.missing_columns(format, rows.columns, text_field=field):
        close = closest(missing[0].lower(), rows.columns)
        hint = f"did you mean {close!r}? " if close else ""
        raise UserError(
            f"{rows.source}: format {format} needs column {', '.join(missing)}; found columns "
            f"{', '.join(rows.columns)}; {hint}name yours with --columns or --dataset-text-field"
        )
    completion_only = settings.completion_only_loss
    if completion_only is None:
        missing = formats.missing_columns("prompt-completion", rows.columns)
        completion_only = format == "alpaca" or not missing
    if format != "input_ids" and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token; set it in tokenizer_config.json")
    if settings.assistant_only_loss and format == "text":
        raise UserError(
            f"{rows.source}: assistant_only_loss needs chat rows, but the format is 'text'; "
            "leave it out, or give a 'messages' column"
        )
    if settings.response_part and format == "input_ids":
        raise UserError(
            f"{rows.source}: --response-part searches text, but the rows are token ids; give "
            "them labels or masks"
        )
    return replace(settings, format=format, completion_only_loss=completion_only)
