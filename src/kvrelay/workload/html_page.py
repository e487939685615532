"""How do figures and pictures of loads go into one page that needs nothing else?"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvrelay.workload.report import Summary
from kvrelay.workload.run_record import RunRecord
from kvrelay.workload.summary_table import PERCENTILES, TITLES, load_rows, seconds

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0 }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
img { max-width: 100%; height: auto } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
"""


def write_page(path: Path, title: str, records: Mapping[str, RunRecord], pictures: Sequence[Path]) -> None:
    """A page of a comparison, or of a single load; `records` are by their names, at least one."""
    config = {name: record.config for name, record in records.items()}
    summaries = {name: record.summary for name, record in records.items()}
    rows = {name: load_rows(summary) for name, summary in summaries.items()}
    figures = next(iter(rows.values()))
    body = "".join(
        (
            f"<h1>{_text(title)}</h1>",
            *(f'<p><img alt="{_text(picture.stem)}" src="{_inline(picture)}"></p>' for picture in pictures),
            "<h2>Load</h2>",
            _table(["", *rows], ([figure, *(of_run[figure] for of_run in rows.values())] for figure in figures)),
            "<h2>Latency in seconds, of completed requests, from when each was due</h2>",
            _table(["", "", *PERCENTILES], _latency_rows(summaries)),
            f"<h2>Made with</h2><pre>{_text(json.dumps(config, indent=2))}</pre>",
        )
    )
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>{body}</body></html>\n'
    )


def _latency_rows(summaries: Mapping[str, Summary]) -> Iterable[list[str]]:
    for latency, title in TITLES.items():
        for name, summary in summaries.items():
            percentiles = getattr(summary, f"{latency}_s")
            yield [title, name, *(seconds(getattr(percentiles, each)) for each in PERCENTILES)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join((f"<th>{_text(row[0])}</th>", *(f"<td>{_text(cell)}</td>" for cell in row[1:]))) for row in rows]
    heads = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _inline(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _text(value: Any) -> str:
    return html.escape(str(value))
