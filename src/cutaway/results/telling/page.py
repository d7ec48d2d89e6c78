"""An explanation as one page, read from the top: answer, what happened, where, which, proof, caveats, how to rerun."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from cutaway.results import drawing
from cutaway.results import page as pages
from cutaway.results.grid import Grid
from cutaway.results.kind import cell_text
from cutaway.results.ranking import Ranking
from cutaway.results.readout import Readout
from cutaway.results.table import Table
from cutaway.results.telling import pictures
from cutaway.results.telling.words import NOUNS, goal, lengths, listed, percent, signed, spoken

if TYPE_CHECKING:
    from cutaway.results.explanation import Explanation

STYLE = """
.picture{margin:.3rem 0}body{max-width:64rem}.lead{max-width:52rem}.prompt{line-height:2.1;margin:.2rem 0 1rem}
.chip{padding:.1rem .28rem;margin:0 .06rem;border-radius:4px;white-space:pre;border-bottom:2px solid var(--line)}
.chip.image{font-style:italic;color:var(--faint)}
.bars{display:grid;grid-template-columns:max-content minmax(4rem,22rem) max-content;gap:.15rem .8rem;align-items:center}
.bar{height:.72rem;border-radius:3px;background:var(--bar);min-width:2px}
.bars .first{font-weight:600}.num{text-align:right!important}
.verdict{border-radius:8px;padding:.6rem .9rem;margin:.8rem 0;border:1px solid var(--line);
border-left:5px solid var(--good)}
.verdict.bad{border-left-color:var(--bad)}
.verdict p{margin:.15rem 0}ul{padding-left:1.2rem}li{margin:.3rem 0}
.more{margin:.6rem 0}.more>summary{cursor:pointer;color:var(--faint)}
.tokens{white-space:pre-wrap;width:max-content;max-width:20rem}
td .bar{display:inline-block;vertical-align:middle}.scroll{max-height:32rem;width:fit-content;max-width:100%}
.scroll tr:last-child td{border-bottom:0}
svg.still{width:min(16rem,60vw);image-rendering:pixelated;border-radius:6px}
:root{--bar:BAR_L;--good:#1a7f4b;--bad:#b35900}
@media(prefers-color-scheme:dark){:root{--bar:BAR_D;--good:#3fb97c;--bad:#f0a04b}}
@media(max-width:40rem){body{margin:1rem auto;padding:0 .8rem}h1{font-size:1.15rem}
.bars{grid-template-columns:max-content 1fr max-content}}
"""
ROWS, MOST_VEIL = 10, 0.5


def page(told: Explanation) -> str:
    """The HTML text; it fetches nothing."""
    drawn: dict[str, drawing.Spec] = {}

    def picture(name: str, spec: drawing.Spec) -> str:
        drawn[name] = {key: value for key, value in spec.items() if key != "title"}
        return f'<div class="picture" id="{name}"></div>'

    parts = [
        f"<h1>{html.escape(told.title[:1].upper() + told.title[1:])}</h1>",
        *_prompt(told),
        *_verdict(told),
        "<h2>The answer</h2>",
        _answers(told),
        "<h2>What happened</h2>",
        f'<p class="lead">{html.escape(" ".join(told.story))}</p>',
        *_where(told, picture),
        *_which(told),
        *_image(told, picture),
        *_proof(told, picture),
        *_list("Caveats", told.caveats),
        *_list("Left out", told.left_out),
        *_list("Notes", told.notes),
        *_parts_notes(told),
        *(pages.provenance(told.made_by) if told.made_by else []),
    ]
    style = STYLE
    for suffix, ink in (("_L", drawing.INKS["light"]), ("_D", drawing.INKS["dark"])):
        style = style.replace("BAR" + suffix, ink["diverging"][-2])
    return pages.whole(told.title, parts, drawn, style.replace("\n", ""))


def _title(name: str) -> str:
    text = NOUNS.get(name, name.replace("_", " "))
    return text[:1].upper() + text[1:]


def _prompt(told: Explanation) -> Iterator[str]:
    """The tokens of the prompt, shaded by what the named heads bring from each; image tokens as one."""
    brought = _brought(told)
    most = max(brought.values(), default=0.0)
    chips = []
    places = list(enumerate(zip(told.tokens, told.roles, strict=True)))
    for is_image, some in groupby(places, key=lambda place: place[1][1] == "image"):
        group = list(some)
        if is_image:
            share = sum(brought.get(at, 0.0) for at, _ in group)
            chips.append(_chip(f"{len(group)} image tokens", share / most if most else 0.0, "chip image", share))
            continue
        for at, (text, _) in group:
            share = brought.get(at, 0.0)
            chips.append(_chip(drawing.shown(text, 40), share / most if most else 0.0, "chip", share))
    yield f'<p class="prompt">{"<wbr>".join(chips)}</p>'


def _chip(text: str, strength: float, kind: str, share: float) -> str:
    veil = (
        f"background:color-mix(in srgb,var(--bar) {MOST_VEIL * min(1.0, strength):.0%},transparent)"
        if strength > 0
        else ""
    )
    said = f' title="{share:.0%} of what the named heads bring"' if strength > 0 else ""
    return f'<span class="{kind}" style="{veil}"{said}>{html.escape(text)}</span>'


def _brought(told: Explanation) -> dict[int, float]:
    """Share of what the named heads bring, by source position."""
    places = told.parts.get("head_positions")
    if not isinstance(places, Ranking) or "source" not in places.columns:
        return {}
    scores = np.maximum(np.nan_to_num(places.scores), 0.0)
    total = float(scores.sum()) or 1.0
    found: dict[int, float] = {}
    for at, score in zip(places.columns["source"].tolist(), scores.tolist(), strict=True):
        found[at] = found.get(at, 0.0) + score / total
    return found


def _verdict(told: Explanation) -> Iterator[str]:
    lines = []
    if told.unproved:
        failed = listed([NOUNS.get(name, name) for name in told.unproved])
        lines.append(
            f"<strong>⚠ Not proved: {html.escape(failed)}.</strong> Taking away those named does not "
            "reliably lower the answer's score more than taking away random others (95 %)."
        )
    if told.proof is not None:
        lines.append(f"{'✓' if told.proof.holds else '⚠'} {html.escape(_capital(told.proof.sentence))}.")
    if not told.proofs:
        lines.append("<strong>⚠ No part has a causal proof.</strong>")
    yield f'<div class="verdict{"" if told.proved else " bad"}">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _answers(told: Explanation) -> str:
    rows = []
    for i, (answer, logp) in enumerate(zip(told.answers, told.answer_log_probs.tolist(), strict=True)):
        chance = float(np.exp(logp))
        first = ' class="first"' if not i else ""
        rows.append(
            f'<span{first}>{html.escape(drawing.shown(answer, 40))}</span><span><div class="bar" '
            f'style="width:{chance:.1%}"></div></span><span{first}>{percent(chance)}</span>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _where(told: Explanation, picture: Callable[[str, drawing.Spec], str]) -> Iterator[str]:
    layers, heads, lens = told.parts.get("layers"), told.parts.get("heads"), told.parts.get("lens")
    if isinstance(layers, Ranking):
        yield f'<h2>Where: layers</h2><p class="faint">What attention and MLP of each layer add to {_goal(told)}.</p>'
        yield picture("layers", pictures.layer_bars(layers))
    if isinstance(heads, Ranking):
        yield f'<h2>Where: heads</h2><p class="faint">What each head adds to {_goal(told)}.</p>'
        yield picture("heads", pictures.head_map(heads).spec())
        yield _ranked(told, "heads")
    flow = told.parts.get("logit_flow")
    if isinstance(flow, Grid) and "position" in flow.axes:
        yield (
            '<h2>Where: flow</h2><p class="faint">Value: what the best neurons add to the answer, at the position that '
            "heads read it from. Query: the same nats, handed back to what wrote into that position before.</p>"
        )
        yield picture("flow", pictures.narrowed(flow, told.roles).spec())
    if isinstance(lens, Readout):
        yield "<h2>What each layer would say</h2>"
        yield _lens(told, lens)


def _goal(told: Explanation) -> str:
    return html.escape(goal(told))


def _lens(told: Explanation, lens: Readout) -> str:
    rows = []
    for i, layer in reversed(list(enumerate(lens.along("layer")))):
        top = ", ".join(
            f"{drawing.shown(t, 16)} {percent(float(np.exp(p)))}"
            for t, p in zip(lens.tokens[i, -1, :3], lens.log_probs[i, -1, :3], strict=True)
        )
        chance, rank = "", ""
        if lens.target_log_prob is not None:
            p = float(np.exp(lens.target_log_prob[i, -1]))
            chance = f'<div class="bar" style="width:{6 * p:.2f}rem"></div> {percent(p)}'
            rank = str(int(lens.target_rank[i, -1]) + 1)
        rows.append([html.escape(str(layer)), html.escape(top), chance, rank])
    return _table(["after layer", "would say", f"p({_goal(told)})", "place"], rows)


def _which(told: Explanation) -> Iterator[str]:
    if "ffn_neurons" in told.parts:
        yield "<h2>Which neurons, and what they write</h2>"
        yield _ranked(told, "ffn_neurons")
    for name in ("query_neurons", "attention_neurons", "head_positions"):
        if name in told.parts:
            yield f'<details class="more"><summary>{_title(name)}</summary>{_ranked(told, name)}</details>'


def _ranked(told: Explanation, name: str) -> str:
    """The first rows of a ranking: component, bar, and what its columns and the projection say."""
    part = told.parts[name]
    if not isinstance(part, Ranking):
        return ""
    columns = {n: each for n, each in part.columns.items() if n not in ("layer", "source", "bound")}
    writes = told.parts.get("writes")
    read: dict[str, tuple[str, str]] = {}
    if isinstance(writes, Table):
        cells = (writes.columns[c].tolist() for c in ("component", "raises", "lowers"))
        read = {component: (raises, lowers) for component, raises, lowers in zip(*cells, strict=True)}
    shown = any(item in read for item in part.items[:ROWS])
    rows = []
    for i, (item, length) in enumerate(zip(part.items[:ROWS].tolist(), lengths(part), strict=False)):
        score = float(part.scores[i])
        row = [
            f'<span title="{html.escape(item)}">{html.escape(spoken(item))}</span>',
            f'<div class="bar" style="width:{5 * length:.2f}rem"></div> {signed(score)}',
            *(html.escape(_cell(each[i])) for each in columns.values()),
        ]
        if shown:
            row += [f'<div class="tokens">{html.escape(_tokens_of(text))}</div>' for text in read.get(item, ("", ""))]
        rows.append(row)
    head = ["component", f"adds ({part.unit})", *columns, *(["raises", "lowers"] if shown else [])]
    return _table([html.escape(each) for each in head], rows)


def _cell(value: object) -> str:
    """A number or text; nothing where there is no number."""
    return "" if value != value else cell_text(value)  # NaN is the only value that is not itself


def _tokens_of(text: str) -> str:
    """The tokens of 'Easton +3.4, Henley +3', without the numbers that the table of what neurons write has."""
    return "  ".join(each.rpartition(" ")[0] for each in text.split(", "))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of ready HTML cells."""
    top = "".join(f"<th>{each}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _image(told: Explanation, picture: Callable[[str, drawing.Spec], str]) -> Iterator[str]:
    if told.image is None:
        return
    yield "<h2>The image</h2>"
    if "image_patches" in told.parts:
        yield picture("patches", told.parts["image_patches"].spec())
        return
    import base64

    from cutaway.results.imagemap import png_size

    wide, tall = png_size(told.image.tobytes())
    data = base64.b64encode(told.image.tobytes()).decode()
    yield f'<svg class="still" viewBox="0 0 {wide} {tall}"><image href="data:image/png;base64,{data}"/></svg>'


def _proof(told: Explanation, picture: Callable[[str, drawing.Spec], str]) -> Iterator[str]:
    proofs = told.proofs
    if not proofs:
        return
    first = next(iter(proofs.values()))
    yield (
        f'<h2>Proof</h2><p class="faint">What {html.escape(first.metric)} loses without the components named (dot), '
        f"against {first.n_draws} random sets of the same kind and layers (grey bar; the tick is their mean).</p>"
    )
    yield picture("proof", pictures.proof_lines(proofs))
    rows = []
    for name, proof in proofs.items():
        random = proof.random[:, -1]
        cells = [f"{'✓' if proof.holds else '⚠'} {proof.ks[-1]} {NOUNS.get(name, name)}", f"{proof.effect[-1]:.3g}"]
        cells += [f"{random.mean():.2g}", f"{random.max():.2g}", proof.evidence, proof.matched]
        rows.append([html.escape(each) for each in cells])
    yield _table(["taken away", f"drop ({first.unit})", "random, mean", "largest", "by rank", "matched by"], rows)


def _parts_notes(told: Explanation) -> Iterator[str]:
    """What the parts say of themselves: what was left out, how many were looked at, how well sums add up."""
    lines = [f"{_title(name)}: {note}" for name, part in told.parts.items() for note in part.notes]
    if lines:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        yield f'<details class="more"><summary>Notes of the parts</summary><ul>{items}</ul></details>'


def _list(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"<h2>{title}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
