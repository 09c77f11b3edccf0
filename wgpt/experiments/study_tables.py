"""The tables and the page of a study."""

from __future__ import annotations

import html
from typing import Any

from wgpt.evaluation.tables import score_table
from wgpt.experiments.html_parts import inline, page, table, text

# Whisper-GPT (arXiv 2412.11449), tables 1 and 2: NLL in nats on LibriSpeech and on music.
PAPER = {"gpt-s": (2.02, 2.78), "gpt-l": (1.94, 2.77), "hybrid": (1.93, 2.52)}
_ARM_HEADER = [
    "arm", "parameters, M", "seeds", "NLL, nats", "closed loop", "minus the twin (95 %)",
    "bits/s", "MFLOP a token", "minutes to its best", "to the twin's best",
]  # fmt: skip


def shown_gap(gap: dict[str, Any]) -> str:
    """`-0.262 (-0.275 to -0.249)`; too few clips have no interval."""
    return f"{gap['nll_nats']:+.3f} ({_interval(gap)})"


def _interval(gap: dict[str, Any]) -> str:
    if gap["low"] is None:
        return f"{gap['n_drawn']} {gap['drawn']}: too few"
    return f"{gap['low']:+.3f} to {gap['high']:+.3f}"


def _arm_cells(result: dict[str, Any]) -> list[list[str]]:
    """The table of arms: what each is, scored, and cost."""
    nats = {row["model"]: row for row in result["rows"] if row["group"] == "all"}
    gap_of = {gap["arm"]: gap for gap in result["gaps"] if gap["group"] == "all"}
    cells = []
    for name, arm in result["arms"].items():
        gap = gap_of.get(name)
        closed, reached = arm["closed_loop_nll_nats"], arm["minutes_to_twin"]
        cells.append([
            name,
            f"{arm['n_parameters'] / 1e6:.2f}",
            f"{len(arm['seeds'])}",
            f"{nats[name]['nll_nats']:.3f}",
            "" if closed is None else f"{closed:.3f}",
            "" if gap is None else shown_gap(gap),
            f"{nats[name]['bits_per_s']:.0f}",
            f"{arm['flops_per_step'] / 1e6:.1f}",
            f"{arm['minutes_to_best']:.0f}",
            "" if reached is None else f"{reached:.0f}",
        ])  # fmt: skip
    return cells


def _drawn(result: dict[str, Any]) -> str:
    """What the intervals are over."""
    if not result["gaps"]:
        return ""
    gap = result["gaps"][0]
    n_seeds = max(max(one["n_seeds"]) for one in result["gaps"])
    over_seeds = f" and over up to {n_seeds} seeds" if n_seeds > 1 else "; of one seed each"
    return (
        f"Differences to {result['twin']}, the token-only twin; intervals of a bootstrap over "
        f"{gap['n_drawn']} {gap['drawn']}{over_seeds}."
    )


def _paper_cells() -> list[list[str]]:
    return [[name, *(f"{nats:.2f}" for nats in both)] for name, both in PAPER.items()]


def _settings(result: dict[str, Any]) -> str:
    both = {**result["model"], **result["train"]}
    return ", ".join(f"{name} {value}" for name, value in both.items() if name != "device")


def as_markdown(result: dict[str, Any]) -> str:
    """All that a study found, as text."""
    lines = [f"Scored on the {result['split']} split of {result['data']}.", ""]
    lines += [f"- {sentence}" for sentence in result["conclusions"]]
    lines += ["", "| " + " | ".join(_ARM_HEADER) + " |", "|---|" + "---:|" * (len(_ARM_HEADER) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _arm_cells(result)]
    lines += ["", _drawn(result), ""]
    lines += [f"- {name}: {arm['purpose']}" for name, arm in result["arms"].items()]
    if result["missing"]:
        lines += ["", f"Not there: {', '.join(result['missing'])}."]
    lines += ["", score_table(result["rows"])]
    by_group = [gap for gap in result["gaps"] if gap["group"] != "all"]
    if by_group:
        lines += ["", "| arm | group | minus the twin (nats) | interval |", "|---|---|---:|---|"]
        lines += [
            f"| {gap['arm']} | {gap['group']} | {gap['nll_nats']:+.3f} | {_interval(gap)} |"
            for gap in by_group
        ]
    lines += ["", "The paper (arXiv 2412.11449), nats:", ""]
    lines += ["| model | LibriSpeech | music |", "|---|---:|---:|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in _paper_cells()]
    return "\n".join([*lines, "", f"Settings: {_settings(result)}."])


def as_page(result: dict[str, Any], curves: bytes) -> str:
    """The same as one HTML page. curves: a PNG."""
    rows = [[row["model"], row["group"], f"{row['nll_nats']:.3f}", f"{100 * row['accuracy']:.2f}",
             f"{row['perplexity']:.2f}", f"{row['bits_per_s']:.0f}", f"{row['n_tokens']}"]
            for row in result["rows"]]  # fmt: skip
    missing = f"<p>Not there: {html.escape(', '.join(result['missing']))}.</p>"
    return page(
        "wgpt study",
        [
            f"<p class=lead>Scored on the {result['split']} split of "
            f"{html.escape(result['data'])}.</p>",
            "<ul>" + "".join(f"<li>{text(said)}" for said in result["conclusions"]) + "</ul>",
            "<h2>Arms</h2>",
            table(_ARM_HEADER, _arm_cells(result)),
            f"<p>{text(_drawn(result))}</p>",
            "<ul>" + "".join(f"<li><b>{name}</b>: {text(arm['purpose'])}"
                             for name, arm in result["arms"].items()) + "</ul>",
            missing if result["missing"] else "",
            "<h2>Validation loss</h2>",
            f'<img class=wide alt="validation NLL by epoch, minus the twin, and by minute" '
            f'src="{inline(curves, "image/png")}">',
            "<h2>Scores</h2>",
            table(["model", "group", "NLL, nats", "accuracy, %", "perplexity", "bits/s", "tokens"],
                  rows),
            "<h2>The paper's figures</h2>",
            "<p>arXiv 2412.11449, nats per coarse token of the released EnCodec, other data and "
            "another codec than here: the differences can be compared, not the values.</p>",
            table(["model", "LibriSpeech", "music"], _paper_cells()),
            f"<p>Settings: {html.escape(_settings(result))}.</p>",
        ],
    )  # fmt: skip
