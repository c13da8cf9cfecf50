"""A report as one HTML file that needs nothing else: tables, plots and pictures, to be opened offline, too."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from fewstep.evaluate.criteria import CriterionResult
from fewstep.evaluate.figures import FIGURES
from fewstep.evaluate.report import MethodResult, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { --ground: #fff; --ink: #1f2933; --soft: #5c6773; --line: #dfe3e8; --mark: #0b6bcb; --bad: #b3261e;
  --tint: #eef5fd; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink); }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p, dd, figcaption { color: var(--soft); } p { max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
.interval { color: var(--soft); font-size: .85em; }
tr.student { background: var(--tint); font-weight: 600; }
.met { color: var(--mark); } .missed { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }
"""


def report_page(
    report: Report,
    *,
    title: str,
    facts: Mapping[str, str],
    criteria: Sequence[CriterionResult] = (),
    plots: Mapping[str, Figure] | None = None,
    pictures: Mapping[str, tuple[bytes, str]] | None = None,
) -> str:
    """The page of a report.

    Args:
        report: of an evaluation.
        title: heading.
        facts: what was measured, and what it cost, by name.
        criteria: acceptance criteria with their outcomes.
        plots: title → plot, which is drawn as SVG.
        pictures: title → PNG and what it shows.
    """
    shown = [name for name in FIGURES if any(getattr(row, name) is not None for row in report.rows)]
    own = list(dict.fromkeys(name for row in report.rows for name in row.scores or ()))
    heads = "".join(
        f'<th title="{escape(FIGURES[name].meaning)}">{escape(FIGURES[name].head)}</th>' for name in shown
    ) + "".join(f"<th>{escape(name)}</th>" for name in own)
    rows = "".join(_row(row, shown, own) for row in report.rows)
    meanings = "".join(
        f"<dt>{escape(one.head)}</dt><dd>{escape(one.meaning)}; {one.better} is better</dd>"
        for one in (FIGURES[name] for name in shown)
    )
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{report.captions:,} captions, the same noise for every method, features of {escape(report.features)}. "
        "Small print: 95 % intervals.</p>",
        f"<dl>{listed}</dl>",
        "<h2>Figures</h2>",
        f'<div class="wide"><table><tr><th></th><th>passes</th>{heads}</tr>{rows}</table></div>',
        "<details><summary>What the columns mean</summary><dl><dt>passes</dt><dd>network passes per image</dd>"
        f"{meanings}</dl></details>",
        _criteria(criteria),
        *(f"<h2>{escape(name)}</h2><figure>{_svg(plot)}</figure>" for name, plot in (plots or {}).items()),
        *(
            f"<h2>{escape(name)}</h2><figure>{_png(content, what)}<figcaption>{escape(what)}</figcaption></figure>"
            for name, (content, what) in (pictures or {}).items()
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _row(row: MethodResult, shown: Sequence[str], own: Sequence[str]) -> str:
    cells = "".join(f"<td>{_cell(row, name)}</td>" for name in shown)
    scores = row.scores or {}
    cells += "".join(f"<td>{_minus(f'{scores[name]:.4g}') if name in scores else '–'}</td>" for name in own)
    kind = ' class="student"' if row.by_student else ""
    return f"<tr{kind}><td>{escape(row.label)}</td><td>{row.passes}</td>{cells}</tr>"


def _cell(row: MethodResult, name: str) -> str:
    value, interval = getattr(row, name), getattr(row, f"{name}_ci", None)
    if value is None:
        return "–"
    figure = FIGURES[name]
    if interval is None:
        return figure.write(value)
    low, high = map(figure.write, interval)
    return f'{figure.write(value)} <span class="interval">{low} to {high}</span>'


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _criteria(results: Sequence[CriterionResult]) -> str:
    if not results:
        return ""
    rows = "".join(
        f'<tr><td>{escape(one.criterion)}</td><td class="{"met" if one.met else "missed"}">'
        f"{'met' if one.met else 'missed'}</td><td>{_minus(f'{one.value:.4g}')}</td>"
        f"<td>{_minus(f'{one.bound:.4g}')}</td></tr>"
        for one in results
    )
    return (
        '<h2>Acceptance criteria</h2><div class="wide"><table><tr><th></th><th></th><th>value</th><th>bound</th></tr>'
        f"{rows}</table></div>"
    )


def _svg(plot: Figure) -> str:
    drawn = io.StringIO()
    plot.savefig(drawn, format="svg", metadata={"Date": None})
    # Without the XML declaration and document type, which HTML has not.
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _png(content: bytes, what: str) -> str:
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
