"""DATA/report.html: the report as one file with histograms and players, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np

from wgpt.data.ceiling import Heard
from wgpt.data.report import report_lines

N_PLAYERS, PLAYER_S = 6, 5.0
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem .3rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #ddd; }
.warning { background: #fff4d6; padding: .5rem .8rem; margin: .4rem 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; } audio { width: 15rem; height: 2.2rem; }
svg text { font: 11px system-ui, sans-serif; fill: #555; }
"""


def page(manifest: dict[str, Any], heard: list[Heard], rate_hz: int) -> str:
    """The page as text; equal inputs give equal bytes."""
    found = manifest["report"]
    facts = [entry["facts"] for entry in manifest["sources"] if "facts" in entry]
    measured = [f["measured"] for f in facts]
    step_s = manifest["mel"]["hop_samples"] / manifest["mel"]["sample_rate_hz"]
    charts = [
        histogram("seconds of a file", [m["seconds"] for m in measured], log=True),
        histogram("seconds of a clip", [n * step_s for f in facts for n in f["steps"]], log=True),
        histogram(
            "loudness of a file, LUFS",
            [m["loudness_lufs"] for m in measured if m["loudness_lufs"] is not None],
        ),
        histogram("gain, dB", [f["done"]["gain_db"] for f in facts]),
        histogram(
            "silence before, share of a file",
            [m["silence_s"] / m["seconds"] for m in measured if m["seconds"]],
        ),
    ]
    warnings = "".join(f'<p class="warning">{html.escape(w)}</p>' for w in found["warnings"])
    n_said = len(found["warnings"])
    lines = report_lines(manifest)[: -n_said or None]
    said = "<br>\n".join(html.escape(line) for line in lines)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Prepared recordings</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Prepared recordings</h1>\n{warnings}\n<p>{said}</p>\n"
        f'<h2>How they are spread</h2>\n<div class="charts">{"".join(charts)}</div>\n'
        f"{_players(heard, rate_hz)}{_skipped(manifest)}</body></html>\n"
    )
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # any bytes in a name


def _players(heard: list[Heard], rate_hz: int) -> str:
    """Some clips as they were encoded, and as the codec gives them back."""
    if not heard:
        return ""
    chosen = heard[:: -(-len(heard) // N_PLAYERS)]
    counts = sorted(chosen[0].decoded)
    heads = "".join(f"<th>{k} codebook{'s' if k > 1 else ''}</th>" for k in counts)
    rows = []
    for clip in chosen:
        waves = [clip.wave, *(clip.decoded[k] for k in counts)]
        cells = "".join(f"<td>{_player(wave, rate_hz)}</td>" for wave in waves)
        rows.append(f"<tr><td>{html.escape(clip.path)}</td>{cells}</tr>")
    return (
        "<h2>What the codec makes of them</h2>\n<p>No model over its tokens can sound better than "
        "the right column.</p>\n<table><tr><th>file</th><th>recording, trimmed</th>"
        f"{heads}</tr>\n{chr(10).join(rows)}</table>\n"
    )


def _player(wave: np.ndarray, rate_hz: int) -> str:
    import soundfile  # here: training on prepared data needs none

    blob = io.BytesIO()
    # MP3: every browser plays it, and unlike Ogg the same wave gives the same bytes.
    soundfile.write(blob, np.clip(wave[: round(PLAYER_S * rate_hz)], -1, 1), rate_hz, format="MP3")
    data = base64.b64encode(blob.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/mpeg;base64,{data}"></audio>'


def _skipped(manifest: dict[str, Any]) -> str:
    if not manifest["skipped"]:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(e['path'])}</td><td>{html.escape(e['reason'])}</td></tr>\n"
        for e in manifest["skipped"][:200]
    )
    more = len(manifest["skipped"]) - 200
    rest = f"<p>and {more} more in manifest.json</p>" if more > 0 else ""
    return f"<h2>Skipped</h2>\n<table>{rows}</table>{rest}\n"


def histogram(title: str, values: list[float], log: bool = False, n_bins: int = 20) -> str:
    """Bars as inline SVG, with the range below; empty without values."""
    if not values:
        return ""
    x = np.asarray(values, dtype=float)
    scaled = np.log(np.maximum(x, 1e-3)) if log else x
    counts, _ = np.histogram(scaled, bins=n_bins)
    width, height, bar = 260, 90, 260 / n_bins
    bars = "".join(
        f'<rect x="{i * bar:.1f}" y="{height - h:.1f}" width="{bar - 1:.1f}" height="{h:.1f}" '
        f'fill="#4a7ab5"><title>{c}</title></rect>'
        for i, c in enumerate(counts)
        for h in [height * c / counts.max()]
    )
    low, high = x.min(), x.max()
    return (
        f'<svg width="{width}" height="{height + 36}" role="img"><text x="0" y="12">'
        f'{html.escape(title)}</text><g transform="translate(0,18)">{bars}</g>'
        f'<text x="0" y="{height + 32}">{low:.3g}</text>'
        f'<text x="{width}" y="{height + 32}" text-anchor="end">{high:.3g}</text></svg>'
    )
