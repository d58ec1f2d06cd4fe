"""Save, verify, load and rotate training checkpoints.

OUTPUT_DIR/checkpoint-N/ holds the model files (an adapter that PEFT loads, or model.safetensors),
optimizer.safetensors (for AdamW exp_avg.NAME and exp_avg_sq.NAME, float32), trainer_state.json, and
manifest.json with the SHA-256 of each file. The directory is written under a temporary name,
synced, and renamed, so a directory with the final name is complete. No random state is stored:
every random draw is a function of (seed, step, row).
"""

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from minisft.config.errors import UserError
from minisft.files.disk import file_digest, load_json_object, sync, write_json, writing
from minisft.files.safetensors import iter_tensors, save_file
from minisft.lora import viewed
from minisft.step import State
from minisft.variants.pissa import trained_half

MANIFEST, OPTIMIZER, TRAINER_STATE = "manifest.json", "optimizer.safetensors", "trainer_state.json"
_COUNTERS = (
    "step", "updates", "loss_scale", "good_steps", "num_tokens", "total_loss", "unlogged",
    "losses", "spikes",
    "best_value", "best_step", "evaluations_since_best",
)  # fmt: skip
_REQUIRED_FACTS: dict[str, Any] = {
    "config": dict,
    **dict.fromkeys(("data_hash", "base_digest", "weights_digest"), str),
    **dict.fromkeys(("step", "updates", "good_steps", "num_tokens", "spikes"), int),
    **dict.fromkeys(("loss_scale", "total_loss"), (int, float)),
    **dict.fromkeys(("unlogged", "losses"), list),
}
_NAME = re.compile(r"checkpoint-\d+")
_TEMPORARY = "tmp-checkpoint-"


def save_checkpoint(
    output_dir: Path, state: State, write_model: Callable[[Path], None], facts: dict[str, Any]
) -> Path:
    """Write checkpoint-{state.step} and return its path.

    write_model(directory) writes the trained tensors; facts (JSON) go into trainer_state.json.
    Raises UserError if the disk is full or read-only; older checkpoints are not affected.
    """
    final = output_dir / f"checkpoint-{state.step}"
    temporary = output_dir / f"{_TEMPORARY}{state.step}-{os.getpid()}"
    try:
        with writing(final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_model(temporary)
            save_file(_optimizer_tensors(state), temporary / OPTIMIZER, {"format": "pt"})
            counters = {name: getattr(state, name) for name in _COUNTERS}
            write_json(temporary / TRAINER_STATE, {**counters, **facts})
            # The rename guarantees that a checkpoint is complete when written. The digests also
            # detect later damage: a flipped bit, a partial copy, a file edited or replaced.
            files = sorted(temporary.iterdir())
            write_json(temporary / MANIFEST, {"files": {p.name: file_digest(p) for p in files}})
            for path in (*files, temporary / MANIFEST, temporary):
                sync(path)
            os.rename(temporary, final)
            sync(output_dir)
    except UserError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{e}. {what_is_kept(output_dir)}") from e
    return final


def read_facts(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's trainer_state.json: counters, and facts saved with them.

    Raises UserError if a field that `load_checkpoint_` or resuming needs is missing or malformed.
    """
    file = path / TRAINER_STATE
    raw = load_json_object(file)
    for name, kind in _REQUIRED_FACTS.items():
        if not isinstance(raw.get(name), kind):
            raise UserError(f"{file}: {name} is missing or malformed; use an older checkpoint")
    return raw


def load_checkpoint_(
    path: Path, state: State, model_file: str, prefix: str, halves: Collection[str] = ()
) -> None:
    """Fill `state` from a verified checkpoint.

    model_file holds each trained tensor under the key prefix + name. halves: names whose tensor in
    the file also holds its initial value (PiSSA). Raises UserError for a missing or misshapen one.
    """
    facts = read_facts(path)
    for name in _COUNTERS:
        setattr(state, name, facts.get(name, getattr(state, name)))
    _fill(path / model_file, state.trainable.views, prefix, halves)
    _fill(path / OPTIMIZER, _optimizer_tensors(state))


def load_trained_(
    path: Path, state: State, model_file: str, prefix: str, halves: Collection[str] = ()
) -> None:
    """Load only the trained tensors, from the best checkpoint; raise UserError if it is damaged."""
    if problem := verify(path):
        where = f"{path}, the best checkpoint"
        raise UserError(f"{where}, cannot be loaded: {problem}. The last one is complete")
    _fill(path / model_file, state.trainable.views, prefix, halves)


def find_checkpoint(output_dir: Path, which: str, say: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that --resume-from-checkpoint selects: `auto` or a path.

    auto: the newest undamaged checkpoint, or None if there is no checkpoint; `say` reports damaged
    checkpoints that are skipped. Raises UserError if the path, or every checkpoint, is damaged:
    starting again from step 0 would discard the checkpoints.
    """
    if which != "auto":
        path, problem, remedy = Path(which), "no such directory", "give a checkpoint-N directory"
        if path.is_dir():
            problem, remedy = verify(path), "use an older checkpoint"
        if problem:
            raise UserError(f"--resume-from-checkpoint {which}: {problem}; {remedy} or `auto`")
        return path
    found = list_checkpoints(output_dir)
    for path in reversed(found):
        if not (problem := verify(path)):
            return path
        say(f"skipping {path.name}: {problem}")
    if found:
        raise UserError(
            f"{output_dir}: all {len(found)} checkpoints are damaged, {found[-1].name} among them "
            f"({verify(found[-1])}); restore one, or start over with --overwrite-output-dir"
        )
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint-N directories, oldest first; [] if output_dir does not exist."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_number)


def what_is_kept(output_dir: Path) -> str:
    """Return a sentence for the user that says how to continue a run that ended early."""
    if not list_checkpoints(output_dir):
        return "There is no checkpoint yet: the same command starts again"
    return "Earlier checkpoints are intact: resume with --resume-from-checkpoint auto"


def set_aside_newer(output_dir: Path, step: int) -> list[str]:
    """Rename the checkpoints beyond `step` to abandoned-checkpoint-N; return their old names.

    They are damaged, or were written by training that was discarded when the run resumed at `step`.
    Renamed, they cannot be mistaken by `auto` or `rotate` for the newest checkpoint of the resumed
    run.
    """
    newer = [p for p in list_checkpoints(output_dir) if _number(p) > step]
    for path in newer:
        aside = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return [p.name for p in newer]


def verify(path: Path) -> str:
    """Return why a checkpoint is unusable, or "" if every file matches its digest."""
    try:
        files = load_json_object(path / MANIFEST)["files"]
        for name, digest in files.items():
            if Path(name).name != name:
                return f"its manifest names {name!r}, outside the directory"
            if not (path / name).is_file():
                return f"{name} is missing"
            if file_digest(path / name) != digest:
                return f"{name} does not match its digest (damaged)"
        if not {OPTIMIZER, TRAINER_STATE} <= set(files):
            return "its manifest is incomplete"
    except (UserError, KeyError, TypeError, AttributeError, OSError) as e:
        return f"no usable {MANIFEST} ({e})"
    return ""


def clean_temporaries(output_dir: Path) -> None:
    """Delete temporary files that an interrupted save or export left in output_dir."""
    for path in output_dir.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in (".*.tmp", ".part-*.safetensors"):
        for path in output_dir.glob(pattern):
            path.unlink(missing_ok=True)


def rotate(output_dir: Path, limit: int, best_step: int = 0) -> None:
    """Delete the oldest checkpoints beyond `limit` (0: no limit), never the newest or the best."""
    paths = list_checkpoints(output_dir)
    best = [p for p in paths[:-1] if _number(p) == best_step]
    others = [p for p in paths[:-1] if p not in best]
    kept = limit - len(best) - 1  # of the others
    for path in others[: len(others) - max(0, kept)] if limit else []:
        # Rename before deleting: if killed halfway, no incomplete checkpoint-N remains.
        doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _optimizer_tensors(state: State) -> dict[str, Any]:
    """Return views of the optimizer's buffers: KIND.NAME per tensor, or KIND for other layouts."""
    trained = state.trainable
    out = {}
    for kind, moment in state.moments.items():
        # 8-bit and factored moments do not have the layout of the trained buffer: store them whole.
        if moment.numel() != trained.buffer.numel() or moment.dtype != torch.float32:
            out[kind] = moment
            continue
        for name, view in viewed(moment, trained.shapes).views.items():
            out[f"{kind}.{name}"] = view
    return out


def _fill(
    file: Path, targets: dict[str, Any], prefix: str = "", halves: Collection[str] = ()
) -> None:
    missing, remedy = set(targets), "resume with the checkpoint's own settings"
    for key, tensor in iter_tensors(file):
        name = key.removeprefix(prefix)
        if name not in targets or key != prefix + name:
            continue
        if name in halves:
            tensor = trained_half(name, tensor)
        found, want = tuple(tensor.shape), tuple(targets[name].shape)
        if found != want:
            raise UserError(f"{file}: {key} is {found}, this run's is {want}; {remedy}")
        targets[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise UserError(f"{file}: {prefix}{min(missing)} is missing; {remedy}")
