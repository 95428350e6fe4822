"""A migration's record as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from vmmig._units import format_bytes, format_seconds

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 260, 84, 34, 14
_PARTS = ("pause", "state", "final_memory", "send_state", "complete")
_COLOURS = ("#4269d0", "#efb118", "#3ca951", "#a463f2", "#ff725c")
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1e23; --dim: #626a76; --line: #d5d9df; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ec; --dim: #9aa3af; --line: #3a4049; --paper: #16181c }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p, .key { color: var(--dim) } p b { color: var(--ink) }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--dim); font-size: 12px }
svg .axis { stroke: var(--line) } svg rect:hover, svg circle:hover { opacity: .7 }
table { margin-top: 1.5rem; border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
.key span { margin-right: 1.2rem; white-space: nowrap }
"""


def page(record: dict[str, Any]) -> str:
    """The page of a `vmmig.live.MigrationReport.to_dict`.

    >>> downtime = dict.fromkeys(["pause_s", "state_s", "final_memory_s", "send_state_s",
    ...                           "complete_s", "total_s"], 0.001)
    >>> record = {"url": "tcp:<host>:1", "ram_bytes": 4096, "sent_bytes": 4096, "connections": 1,
    ...           "handed_over": False, "iterations": [], "decision": None, "downtime": downtime,
    ...           "total_s": 0.5}
    >>> "tcp:&lt;host&gt;:1" in page(record)
    True
    """
    passes = record["iterations"]
    downtime = record["downtime"]
    how = (
        "its memory was handed over"
        if record["handed_over"]
        else f"{format_bytes(record['sent_bytes'])} were sent over {record['connections']} "
        + ("connection" if record["connections"] == 1 else "connections")
    )
    body = [
        f"<h1>Live migration to {escape(record['url'])}</h1>",
        f"<p><b>{format_bytes(record['ram_bytes'])}</b> of RAM moved in "
        f"<b>{format_seconds(record['total_s'])}</b>, with "
        f"<b>{format_seconds(downtime['total_s'])}</b> of downtime; {how}.</p>",
    ]
    if record["decision"]:
        body.append(f"<p>Why it was paused: {escape(record['decision']['reason'])}.</p>")
    if passes:
        body += [
            "<h2>Memory by iteration</h2>",
            '<p class="key"><span><i class="swatch" style="background:#4269d0"></i>sent</span>'
            '<span><i class="swatch" style="background:#ff725c"></i>dirtied meanwhile</span></p>',
            _bars([(each["sent_bytes"], each["dirty_bytes"]) for each in passes]),
            "<h2>Rate by iteration</h2>",
            _line([_rate(each) for each in passes]),
            _table(passes),
        ]
    body += ["<h2>Downtime</h2>", _split(downtime)]
    data = json.dumps(record).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Live migration</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f'\n<script type="application/json" id="record">{data}</script>\n</body></html>\n'
    )


def _rate(each: dict[str, Any]) -> float:
    return float(each["sent_bytes"] / each["duration_s"]) if each["duration_s"] else 0.0


def _bars(pairs: Sequence[tuple[int, int]]) -> str:
    most = max(max(pair) for pair in pairs) or 1
    step = (_WIDTH - _LEFT) / len(pairs)
    bar = min(step * 0.36, 48)
    marks = []
    for i, pair in enumerate(pairs):
        middle = _LEFT + step * (i + 0.5)
        for at, value, colour, what in (
            (middle - bar - 1, pair[0], "#4269d0", "sent"),
            (middle + 1, pair[1], "#ff725c", "dirtied meanwhile"),
        ):
            height = (_HEIGHT - _BOTTOM - _TOP) * value / most
            marks.append(
                f'<rect class="bar" x="{at:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
                f'width="{bar:.1f}" height="{max(height, 0.5):.1f}" rx="2" fill="{colour}">'
                f"<title>iteration {i + 1}: {format_bytes(value)} {what}</title></rect>"
            )
    return _chart(marks, len(pairs), most, "", "Bytes sent and dirtied in each iteration")


def _line(rates: Sequence[float]) -> str:
    most = max(rates) or 1
    step = (_WIDTH - _LEFT) / len(rates)
    points = [
        (
            _LEFT + step * (i + 0.5),
            _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * rate / most,
        )
        for i, rate in enumerate(rates)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [f'<polyline points="{path}" fill="none" stroke="#3ca951" stroke-width="2"/>']
    marks += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#3ca951">'
        f"<title>iteration {i + 1}: {format_bytes(rates[i])}/s</title></circle>"
        for i, (x, y) in enumerate(points)
    ]
    return _chart(marks, len(rates), most, "/s", "Bytes sent in a second, in each iteration")


def _chart(marks: list[str], count: int, most: float, unit: str, label: str) -> str:
    axes = []
    for quarter in range(5):
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * quarter / 4
        axes.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{format_bytes(most * quarter / 4)}{unit}</text>"
        )
    step = (_WIDTH - _LEFT) / count
    every = -(-count // 16)
    axes += [
        f'<text x="{_LEFT + step * (i + 0.5):.1f}" y="{_HEIGHT - _BOTTOM + 18}" '
        f'text-anchor="middle">{i + 1}</text>'
        for i in range(0, count, every)
    ]
    axes.append(
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">iteration</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        + "".join(axes + marks)
        + "</svg>"
    )


def _split(downtime: dict[str, float]) -> str:
    total_s = sum(downtime[f"{part}_s"] for part in _PARTS) or 1.0
    at = 0.0
    marks, key = [], []
    for part, colour in zip(_PARTS, _COLOURS, strict=True):
        value = downtime[f"{part}_s"]
        name = part.replace("_", " ")
        width = _WIDTH * value / total_s
        marks.append(
            f'<rect class="part" x="{at:.1f}" y="0" width="{width:.1f}" height="34" '
            f'fill="{colour}"><title>{name}: {format_seconds(value)}</title></rect>'
        )
        key.append(
            f'<span><i class="swatch" style="background:{colour}"></i>{name} '
            f"{format_seconds(value)}</span>"
        )
        at += width
    return (
        f'<svg viewBox="0 0 {_WIDTH} 34" role="img" aria-label="Where the downtime went">'
        + "".join(marks)
        + f'</svg><p class="key">{"".join(key)}</p>'
    )


def _table(passes: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{each['iteration']}</td><td>{format_bytes(each['sent_bytes'])}</td>"
        f"<td>{format_seconds(each['duration_s'])}</td><td>{format_bytes(_rate(each))}/s</td>"
        f"<td>{format_bytes(each['dirty_bytes'])}</td></tr>"
        for each in passes
    )
    return (
        "<table><thead><tr><th>iteration</th><th>sent</th><th>time</th><th>rate</th>"
        f"<th>dirtied meanwhile</th></tr></thead><tbody>{rows}</tbody></table>"
    )
