"""Results as markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score_table(rows: list[dict[str, Any]]) -> str:
    """Rows of Score.row() as a markdown table."""
    lines = [
        "| model | group | NLL (nats) | accuracy | perplexity | bits/s | tokens |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['group']} | {row['nll_nats']:.3f} "
            f"| {100 * row['accuracy']:.2f} % | {row['perplexity']:.2f} "
            f"| {row['bits_per_s']:.0f} | {row['n_tokens']} |"
        )
    return "\n".join(lines)


def codebook_table(rows: list[dict[str, Any]]) -> str:
    """Rows of Score.row() with a `codebook` as a markdown table."""
    lines = [
        "| codebook | group | NLL (nats) | accuracy | perplexity |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['codebook']} | {row['group']} | {row['nll_nats']:.3f} "
            f"| {100 * row['accuracy']:.2f} % | {row['perplexity']:.2f} |"
        )
    return "\n".join(lines)


def drift_table(result: dict[str, Any]) -> str:
    """The result of `drift` as a markdown table."""
    lines = [
        f"| second of {result['n_rollouts']} rollouts | log-mel distance (dB) "
        "| token histogram distance (TV) |",
        "|---|---:|---:|",
    ]
    named = [(row["second"], row) for row in result["seconds"]]
    named += [
        ("real sound", result["floor"]),
        (f"real sound, {result['n_codebooks']} codebook(s)", result["codec"]),
    ]
    lines += [
        f"| {name} | {row['log_mel_db']:.2f} | {row['token_tv']:.3f} |" for name, row in named
    ]
    return "\n".join(lines)


def listener_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `drift`'s listeners as a markdown table; a measure that no row has is left out."""
    titles = {
        "speaker": "speaker, cosine to the prompt",
        "confidence": "recogniser's confidence",
        "words_per_s": "words/s",
    }
    titles = {name: title for name, title in titles.items() if any(name in row for row in rows)}
    lines = ["| sound | n | " + " | ".join(titles.values()) + " |"]
    lines.append("|---|---:|" + "---:|" * len(titles))
    for row in rows:
        cells = [f"{row[name]:.3f}" for name in titles]
        lines.append(f"| {row['sound']} | {row['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def distance_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Results of `distances` by kind of sound, as a markdown table."""
    what = ("Frechet, dB", "spectrum, dB", "periodicity")
    titles = [f"{kind}: {title}" for kind in found for title in what]
    lines = ["| continuation | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for name in next(iter(found.values())):
        cells = [f"{value:.2f}" for of_kind in found.values() for value in of_kind[name].values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
