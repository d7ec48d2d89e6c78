"""The pictures of a report that no single result draws: layers in depth, the map of heads, proofs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cutaway.ops.units import Unit
from cutaway.results import drawing
from cutaway.results.grid import Grid
from cutaway.results.telling.words import NOUNS, spoken

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cutaway.core.proof import Proof
    from cutaway.results.ranking import Ranking

POSITIONS = 48  # columns of a flow that a reader can tell apart
ROOM, TALL, BAND, LINE = 720, 170, 44, 26
SIDES = {"attn.out": "attention", "mlp.out": "MLP"}
KNEE = 0.01  # smaller numbers of the proofs' axis are drawn on a plain scale, larger ones on a logarithmic one


def layer_bars(layers: Ranking) -> drawing.Spec:
    """What the attention and the MLP of every layer add, side by side, in depth."""
    rows: list[dict[str, Any]] = []
    for item, score in zip(layers.items.tolist(), layers.scores.tolist(), strict=True):
        unit = Unit.parse(item)
        row = {"layer": unit.layer, "part": SIDES[unit.kind], "item": spoken(item)}
        rows.append({**row, "value": drawing.finite(score), "shown": drawing.digits(score)})
    depth = 1 + max((row["layer"] for row in rows), default=0)
    title = drawing.named(layers.measure, layers.unit)
    labels = drawing.axis(list(range(depth)), "Layer", min(BAND, ROOM / depth), horizontal=True)
    numbers = {"title": title, "domain": False, "tickCount": 5} | drawing.number_format(layers.scores)
    encoding = {
        "x": {"field": "layer", "type": "ordinal", "axis": labels, "scale": {"domain": list(range(depth))}},
        "xOffset": {"field": "part", "type": "nominal", "sort": list(SIDES.values())},
        "y": {"field": "value", "type": "quantitative", "axis": numbers},
        "color": {
            "field": "part",
            "type": "nominal",
            "sort": list(SIDES.values()),
            "legend": {"title": None, "orient": "top"},
        },
        "tooltip": [{"field": "item", "type": "nominal"}, {"field": "shown", "type": "nominal", "title": title}],
    }
    width = {"step": min(BAND, ROOM / depth)}
    body = {"data": {"values": rows}, "mark": {"type": "bar"}, "encoding": encoding, "width": width, "height": TALL}
    return drawing.document(body, drawing.heading(""))


def head_map(heads: Ranking) -> Grid:
    """What every head adds, layer by head; NaN where a layer has no such head."""
    units = [Unit.parse(item) for item in heads.items]
    layers = sorted({unit.layer for unit in units})
    width = 1 + max((unit.number for unit in units), default=-1)
    values = np.full((len(layers), width), np.nan)
    for unit, score in zip(units, heads.scores, strict=True):
        values[layers.index(unit.layer), unit.number] = score
    return Grid(
        values=values, axes=("layer", "head"), labels={"layer": tuple(layers)}, measure=heads.measure, unit=heads.unit
    )


def narrowed(flow: Grid, roles: np.ndarray) -> Grid:
    """A flow over positions that fits a page: image positions as one column, of many others the strongest."""
    values, labels, places = flow.values, list(flow.along("position")), np.arange(flow.values.shape[-1])
    image = roles == "image"
    if image.sum() > 1:
        first = int(places[image][0])
        merged = np.where(np.isnan(values[..., image]).all(-1), np.nan, np.nansum(values[..., image], axis=-1))
        values = values.copy()
        values[..., first] = merged
        labels[first] = f"{int(image.sum())} image tokens"
        places = places[~image | (places == first)]
    if len(places) > POSITIONS:
        strength = np.nan_to_num(np.abs(values[..., places])).reshape(-1, len(places)).sum(axis=0)
        places = places[np.sort(np.argsort(-strength, kind="stable")[:POSITIONS])]
    named = {**flow.labels, "position": tuple(labels[at] for at in places)}
    return flow.replace(values=values[..., places], labels=named, check=None, proof=None)


def proof_lines(proofs: Mapping[str, Proof]) -> drawing.Spec:
    """The drop without each named set, beside the range that random sets give."""
    rows = []
    for place, (name, proof) in enumerate(proofs.items()):
        random = proof.random[:, -1]
        row = {"y": place, "part": NOUNS.get(name, name), "value": drawing.finite(proof.effect[-1])}
        row |= {"low": drawing.finite(random.min()), "high": drawing.finite(random.max())}
        row |= {"mean": drawing.finite(random.mean()), "shown": drawing.digits(proof.effect[-1])}
        row |= {"random": f"{random.min():.2g} to {random.max():.2g}", "holds": "yes" if proof.holds else "no"}
        rows.append(row)
    labels = [f"{proof.ks[-1]} {NOUNS.get(name, name)}" for name, proof in proofs.items()]
    names = drawing.axis(labels, "", LINE, horizontal=False, longest=40)
    names |= {"domain": False, "ticks": False, "labelLimit": 300}
    unit = next(iter(proofs.values())).unit if proofs else ""
    measure = drawing.named("Drop without them", unit)
    x: drawing.Spec = {
        "type": "quantitative",
        "scale": {"type": "symlog", "constant": KNEE},
        "axis": {"title": measure, "grid": True, "domain": False, "values": _ticks(rows), "format": "~g"},
    }
    y: drawing.Spec = {"field": "y", "type": "ordinal", "axis": names}
    said = [{"field": "part", "type": "nominal"}, {"field": "shown", "type": "nominal", "title": measure}]
    said += [{"field": "random", "type": "nominal", "title": "random sets"}, {"field": "holds", "type": "nominal"}]
    layers: list[drawing.Spec] = [
        {
            "mark": {"type": "bar", "height": 9, "style": "missing", "cornerRadius": 3},
            "encoding": {"y": y, "x": {"field": "low", **x}, "x2": {"field": "high"}, "tooltip": said},
        },
        {
            "mark": {"type": "tick", "style": "faint", "thickness": 2, "size": 13},
            "encoding": {"y": y, "x": {"field": "mean", **x}, "tooltip": said},
        },
    ]
    for held, style in (("yes", "positive"), ("no", "faint")):
        mark: drawing.Spec = {"type": "point", "filled": True, "size": 90, "opacity": 1, "style": style}
        encoding: drawing.Spec = {"y": y, "x": {"field": "value", **x}, "tooltip": said}
        layers.append({"transform": [{"filter": f"datum.holds === '{held}'"}], "mark": mark, "encoding": encoding})
    body = {"data": {"values": rows}, "width": 480, "height": {"step": LINE}, "layer": layers}
    return drawing.document(body, drawing.heading(""))


def _ticks(rows: list[dict[str, Any]]) -> list[float]:
    """Powers of ten on both sides of zero, as far as the numbers go."""
    numbers = [abs(row[name]) for row in rows for name in ("value", "low", "high") if row[name] is not None]
    powers = [p for p in (0.01, 0.1, 1.0, 10.0, 100.0) if p <= 1.5 * max(numbers, default=1.0)] or [KNEE]
    below = min((row[name] for row in rows for name in ("value", "low") if row[name] is not None), default=0.0)
    return [*(-p for p in reversed(powers) if p <= -below), 0.0, *powers]
