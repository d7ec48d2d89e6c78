"""One self-contained HTML file for a result: picture, table, evidence and how to make it again. No network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.core.errors import ResultError
from cutaway.results import drawing
from cutaway.results.kind import cell_text

if TYPE_CHECKING:
    import pandas

    from cutaway.core.proof import Provenance
    from cutaway.results.kind import Kind

ROWS = 200

STYLE = """
:root{color-scheme:light dark;--paper:PAPER_L;--ink:INK_L;--faint:FAINT_L;--line:LINE_L}
@media(prefers-color-scheme:dark){:root{--paper:PAPER_D;--ink:INK_D;--faint:FAINT_D;--line:LINE_D}}
body{background:var(--paper);color:var(--ink);font:15px/1.5 FONT;margin:2rem auto;max-width:1200px;padding:0 1.2rem}
h1{font-size:1.35rem;font-weight:600;margin:0 0 .3rem}h2{font-size:1rem;font-weight:600;margin:1.8rem 0 .4rem}
.faint{color:var(--faint)}.picture{overflow-x:auto;margin:1rem 0}
.held::before{content:"✓ "}.failed::before{content:"⚠ "}
.failed{font-weight:600}.scroll{overflow:auto;max-height:28rem;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;text-align:left;border-bottom:1px solid var(--line);unicode-bidi:isolate;white-space:pre}
th{position:sticky;top:0;background:var(--paper)}
pre{background:color-mix(in srgb,var(--ink) 6%,transparent);padding:.7rem;
border-radius:6px;overflow:auto;font-size:13px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:13px}
dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}
"""

# The picture is drawn again when the reader's system switches between light and dark.
SCRIPT = """
{
const pictures = JSON.parse(document.getElementById("pictures").textContent);
const themes = JSON.parse(document.getElementById("themes").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const options = {actions: {export: true, source: false, compiled: false, editor: false}, renderer: "svg"};
const draw = () => { for (const [id, spec] of Object.entries(pictures))
  vegaEmbed("#" + id, {...spec, config: dark.matches ? themes.dark : themes.light}, options); };
dark.addEventListener("change", draw);
draw();
}
"""


def page(result: Kind, **options: Any) -> str:
    """The HTML text; ``options`` choose the picture as in ``spec``."""
    pictures = {"picture": result.drawn(**options)} | ({"proof": proof_spec(result)} if result.proof else {})
    rows = result.highlights()
    title = html.escape(result.title or result.kind)
    more = f"the first {ROWS} of {len(rows):,} rows" if len(rows) > ROWS else f"{len(rows):,} rows"
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="faint">{html.escape(_about(result))}</p>',
        *_evidence(result),
        '<div class="picture" id="picture"></div>',
        *(['<h2>Proof</h2><div class="picture" id="proof"></div>'] if result.proof else []),
        f'<h2>Table</h2><p class="faint">{more}</p><div class="scroll">{table_html(rows)}</div>',
        *_provenance(result),
    ]
    return whole(result.title or result.kind, parts, pictures)


def whole(title: str, parts: Sequence[str], pictures: dict[str, drawing.Spec], style: str = "") -> str:
    """A page of HTML parts; each picture is drawn in the element that has its name as id."""
    themes = {"light": drawing.theme(), "dark": drawing.theme(dark=True)}
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_style()}{style}</style></head>\n<body>\n{chr(10).join(parts)}\n"
        f'<script type="application/json" id="pictures">{_embedded(pictures)}</script>\n'
        f'<script type="application/json" id="themes">{_embedded(themes)}</script>\n'
        f"<script>{vega_script()}</script>\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def proof_spec(result: Kind) -> drawing.Spec:
    """The named set's effect over its size, against the mean and the range of the random draws."""
    from cutaway.results.series import Series

    proof = result.proof
    if proof is None:
        raise ResultError("drawing a proof", f"this {result.kind} has none")
    missing = np.full(len(proof.ks), np.nan)
    curves = Series(
        title=f"{proof.ablated}, against {proof.n_draws} random draws",
        x=np.array(proof.ks),
        y=np.stack([proof.effect, proof.random.mean(axis=0)]),
        lo=np.stack([missing, proof.random.min(axis=0)]),
        hi=np.stack([missing, proof.random.max(axis=0)]),
        labels={"line": ("named here", f"random, matched by {proof.matched}")},
        x_name="set size k",
        interval="smallest and largest of the random draws",
        measure=f"change of {proof.metric}",
        unit=proof.unit,
    )
    return curves.spec()


@cache
def vega_script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines ``vegaEmbed``."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def still_html(png: bytes) -> str:
    """A drawn picture as an image that carries its own bytes."""
    return f'<img alt="" style="max-width:100%" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table_html(rows: pandas.DataFrame) -> str:
    """The first rows as an HTML table; every cell escaped, spaces of tokens visible."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell_text(each))}</td>" for each in row) + "</tr>"
        for row in rows.iloc[:ROWS].itertuples(index=False)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _about(result: Kind) -> str:
    sizes = {
        dim: n for name, data in result.arrays().items() for dim, n in zip(result.dims()[name], data.shape, strict=True)
    }
    shape = " × ".join(f"{n} {dim}{'s' if n != 1 and not dim.endswith('s') else ''}" for dim, n in sizes.items())
    made = f"{result.made_by.method} on {result.made_by.model}" if result.made_by else result.kind
    return " · ".join(each for each in (made, shape, result.unit) if each)


def _evidence(result: Kind) -> list[str]:
    lines = [("Check", result.check), ("Proof", result.proof)]
    parts = [
        f'<p class="{"held" if each.holds else "failed"}">{name}: {html.escape(str(each))}</p>'
        for name, each in lines
        if each is not None
    ]
    return parts + [f'<p class="faint">Note: {html.escape(note)}</p>' for note in result.notes]


def _provenance(result: Kind) -> list[str]:
    return provenance(result.made_by) if result.made_by else []


def provenance(made: Provenance) -> list[str]:
    """How to make it again, and what it was made with."""
    facts = {
        "model": f"{made.model} {made.model_digest}".strip(),
        "inputs": made.inputs_digest,
        "seed": "" if made.seed is None else str(made.seed),
        "device": f"{made.device} {made.dtype}".strip(),
        "seconds": "" if made.seconds is None else f"{made.seconds:.3g}",
        "created": made.created,
        "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items() if text)
    again = html.escape(f"{made.command()}\n\n{made.code()}")
    return [f"<h2>How to rerun</h2><pre>{again}</pre><dl>{listed}</dl>"]


def _style() -> str:
    style = STYLE.replace("FONT", drawing.FONT)
    for suffix, ink in (("_L", drawing.INKS["light"]), ("_D", drawing.INKS["dark"])):
        for name in ("paper", "ink", "faint", "line"):
            style = style.replace(name.upper() + suffix, ink[name])
    return style.strip()


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return re.sub(r"[<>&]", lambda found: f"\\u{ord(found.group()):04x}", json.dumps(value, allow_nan=False))
