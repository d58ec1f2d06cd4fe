"""scripts/plot.py: every panel shows the logged numbers; errors are one line."""

import json
import struct

import pytest
from runs import call, script

pytest.importorskip("matplotlib")


def write_run(directory, scale=1.0, torn=False):
    directory.mkdir()
    lines = [{"step": 0, "eval_loss": 3.0 * scale}]
    for step in range(1, 9):
        line = {"step": step, "loss": scale / step, "learning_rate": 1e-3, "grad_norm": 1.0}
        lines.append(line | {"tokens_per_second": 100.0 * step, "peak_memory_gib": 0.5})
    lines[3]["grad_norm"] = None  # a step that was skipped
    lines.append({"step": 8, "eval_loss": scale})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + '{"step": 9, "lo' * torn)
    return str(directory)


def test_runs_are_drawn_into_one_png(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", 2.0, torn=True)]
    drawn = []
    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **k: drawn.append((x, y)) or plot(self, x, y, **k)
    )
    out = tmp_path / "plot.png"
    outcome = call("plot", [*runs, "--output", str(out), "--smooth", "3"])
    assert outcome.code == 0 and f"saved to {out}" in outcome.out
    data = out.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1440, 1200)
    steps = list(range(1, 9))
    wanted = [(steps, [scale / s for s in steps]) for scale in (1.0, 2.0)]
    assert drawn[0] == wanted[0] and drawn[2] == wanted[1]
    assert drawn[1][1] == pytest.approx([1, 0.75, 11 / 18, 13 / 36, 47 / 180, 37 / 180, 107 / 630,
                                         73 / 504])  # fmt: skip
    assert ([0, 8], [3.0, 1.0]) in drawn and ([0, 8], [6.0, 2.0]) in drawn
    assert ([1, 2, 4, 5, 6, 7, 8], [1.0] * 7) in drawn
    assert len(drawn) == 2 * 6 + 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give one or more output directories"),
        (["nowhere"], "nowhere: cannot be read"),
        (["empty"], "contains no training step yet"),
        (["a", "--smooth", "0"], "--smooth is 0; expected 1 or more"),
        (["a", "--output", "no/where.png"], "--output no/where.png: cannot be written (No su"),
        (["a", "--output", "a.jpgg"], "a.jpgg: cannot be written (Format 'jpgg' is not supported"),
        (["a", "--outptu", "x"], "did you mean --output?"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    outcome = call("plot", argv)
    assert outcome.code == 2 and message in outcome.err, outcome


def test_the_loss_is_smoothed_over_the_last_lines():
    assert script("plot").smoothed([4.0, 2.0, 0.0, 0.0], 2) == [4.0, 3.0, 1.0, 0.0]


def test_a_run_that_begins_with_an_underscore_has_a_name_too():
    """matplotlib omits labels that begin with an underscore."""
    shown = script("plot").shown
    assert shown("_a").strip() == "_a" and not shown("_a").startswith("_") and shown("a_") == "a_"


def test_single_panels_are_drawn_as_svg(tmp_path):
    """Only the requested panels are drawn; an unknown one is an error that names it."""
    run = write_run(tmp_path / "a")
    out = tmp_path / "loss.svg"
    assert call("plot", [run, "--panels", "loss", "grad_norm", "--output", str(out)]).code == 0
    titles = [
        title for title in script("plot").PANELS.values() if f"<!-- {title} -->" in out.read_text()
    ]
    assert titles == ["loss (nats per token)", "gradient norm, before clipping"]
    outcome = call("plot", [run, "--panels", "losses"])
    assert outcome.code == 2 and "--panels is 'losses'; expected some of loss, " in outcome.err
