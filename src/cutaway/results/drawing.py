"""The one look of all pictures: theme, cell sizes, axes with token labels, and the heat map that several kinds share.

Everything that depends on light or dark lives in ``theme``; a specification itself never names a colour.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
EMPTY = "nothing to draw: the result is empty"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
LONGEST_LABEL = 18
LONGEST_PANEL = 24  # characters of the name of a panel
LABEL_PIXELS = 11  # room that one line of label text needs
CHARACTER_PIXELS = 6.0
NARROWEST_SIDE = 96  # pixels that the title of an axis needs beside it
SMALL, LARGE = 1e-3, 1e7  # outside of these, numbers are written as powers of ten

Spec = dict[str, Any]

# Both ramps rise steadily in lightness and stay readable without red-green vision; zero is the colour of the paper.
INKS: dict[str, dict[str, Any]] = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1f2328",
        "faint": "#59636e",
        "line": "#d8dce1",
        "missing": "#c3c7cc",
        "on_high": "#ffffff",
        "ramp": ["#f6f7ee", "#cfe8d2", "#8fd0bf", "#4aa9b9", "#2b78aa", "#264d8c", "#1b2759"],
        "diverging": ["#0f3f75", "#3f82bb", "#a2cbe4", "#f5f4f1", "#fbc88f", "#df8021", "#864503"],
        "category": ["#0072b2", "#d55e00", "#009e73", "#b5679a", "#7a6a00", "#3aa0d8", "#444444"],
    },
    "dark": {
        "paper": "#14171b",
        "ink": "#e8eaed",
        "faint": "#a3abb5",
        "line": "#343a42",
        "missing": "#4b525b",
        "on_high": "#101214",
        "ramp": ["#1d2229", "#25435a", "#236f85", "#3a9f8c", "#84c973", "#f3ea5f"],
        "diverging": ["#9bd0ff", "#4a93d6", "#24507e", "#20242a", "#80491a", "#d98227", "#ffcb8a"],
        "category": ["#56b4e9", "#ff9a4d", "#33c79b", "#e39ccb", "#e6d34a", "#8fb8ff", "#cccccc"],
    },
}


def theme(dark: bool = False) -> Spec:
    """The Vega-Lite ``config`` for a light or a dark page."""
    ink = INKS["dark" if dark else "light"]
    text = {"labelColor": ink["faint"], "titleColor": ink["ink"], "labelFontSize": 10, "titleFontSize": 11}
    return {
        "background": ink["paper"],
        "font": FONT,
        "padding": 12,
        "title": {
            "anchor": "start",
            "frame": "group",
            "color": ink["ink"],
            "subtitleColor": ink["faint"],
            "fontSize": 14,
            "fontWeight": 600,
            "subtitleFontSize": 11,
            "subtitlePadding": 4,
            "offset": 10,
        },
        "axis": {**text, "titleFontWeight": 500, "domainColor": ink["line"], "tickColor": ink["line"], "tickSize": 3}
        | {"gridColor": ink["line"], "gridOpacity": 0.6, "labelLimit": 160, "titlePadding": 8},
        "legend": {**text, "titleFontWeight": 500, "titleLimit": 220, "labelLimit": 260},
        "header": {**text, "titleFontWeight": 500, "labelFontSize": 11, "labelColor": ink["ink"]},
        "view": {"stroke": None},
        "facet": {"spacing": 14},
        "style": {
            "missing": {"color": ink["missing"]},
            "on_low": {"color": ink["ink"]},
            "on_high": {"color": ink["on_high"]},
            "faint": {"color": ink["faint"]},
            "rule": {"color": ink["line"]},
            "positive": {"color": ink["diverging"][-2]},
            "negative": {"color": ink["diverging"][1]},
            "halo": {"color": ink["paper"], "stroke": ink["paper"], "strokeWidth": 4},
            "plate": {"color": ink["paper"], "stroke": ink["faint"], "strokeWidth": 0.7},
        },
        "range": {"ramp": ink["ramp"], "heatmap": ink["ramp"], "diverging": ink["diverging"]}
        | {"category": ink["category"], "ordinal": {"scheme": ink["ramp"][1:]}},
    }


def shown(text: Any, longest: int = LONGEST_LABEL) -> str:
    """Text of a token as a reader can see it: outer spaces as '·', line ends as '⏎', tabs as '⇥', controls as codes."""
    text = str(text)
    core = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    text = "·" * lead + core + "·" * (len(text) - lead - len(core)) if core else "·" * len(text)
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = "".join(each if each.isprintable() or each in JOINERS else f"\\x{ord(each):02x}" for each in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


JOINERS = "\u200c\u200d"  # they hold emoji and some scripts together and must stay


def digits(value: float) -> str:
    """A number with the digits a reader needs: four significant ones."""
    return f"{value:.4g}"


def finite(value: Any) -> float | None:
    """The number, or None where JSON and a colour have none (NaN, infinity)."""
    return float(value) if math.isfinite(value) else None


def heading(title: str, *lines: str) -> Spec:
    """A picture's title, folded to a readable width, with finer lines below it."""
    folded = textwrap.wrap(title, 72) or [""]
    return {"text": folded, "subtitle": [part for line in lines if line for part in textwrap.wrap(line, 96)]}


def named(dim: str, unit: str = "") -> str:
    """A dimension or measure as an axis title: 'Layer', 'Effect (nats)'."""
    words = dim.replace("_", " ").strip()
    words = words[:1].upper() + words[1:]
    return f"{words} ({unit})" if unit and words and unit.lower() != words.lower() else words or unit


def step(count: int, room: float, largest: float, smallest: float = 3) -> float:
    """Pixels per cell so that ``count`` cells fit in ``room``, within what a reader can tell apart.

    Halves of a pixel, so that a picture at twice the size has no seams between cells.
    """
    count = max(count, 1)
    fitting = max(min(largest, max(smallest, room / count)), NARROWEST_SIDE / count)
    return math.floor(2 * fitting) / 2 if fitting * count > NARROWEST_SIDE else math.ceil(2 * fitting) / 2


def axis(labels: Sequence[Any], title: str, pixels: float, horizontal: bool, longest: int = LONGEST_LABEL) -> Spec:
    """An axis over places 0, 1, 2 ... that shows their labels, turned or thinned out until none touches the next."""
    texts = [shown(each, longest) for each in labels]
    room = max((len(each) for each in texts), default=0) * CHARACTER_PIXELS
    turned = horizontal and room > pixels - 2
    every = max(1, math.ceil(LABEL_PIXELS / pixels)) if turned or not horizontal else 1
    if turned and all(isinstance(each, int) for each in labels):  # numbers read better upright, fewer of them
        turned, every = False, math.ceil((room + 6) / pixels)
    found: Spec = {
        "title": title,
        "values": list(range(0, len(texts), every)),
        "labelExpr": f"{json.dumps(texts)}[datum.value]",
        "labelOverlap": False,
        "grid": False,
    }
    if horizontal:
        found |= {"labelAngle": -90 if turned else 0, "labelAlign": "right" if turned else "center"}
        found |= {"labelBaseline": "middle" if turned else "top", "orient": "bottom"}
    return found


def signed_domain(values: np.ndarray, center: float = 0.0) -> tuple[float, float]:
    """Equal distances to both sides of the centre, so that equal colours mean equal sizes."""
    good = values[np.isfinite(values)]
    reach = float(np.abs(good - center).max(initial=0.0)) or 1.0
    return center - reach, center + reach


def domain(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite value, never equal."""
    good = values[np.isfinite(values)]
    if not good.size:
        return 0.0, 1.0
    low, high = float(good.min()), float(good.max())
    return (low, high) if high > low else (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)


def from_zero(values: np.ndarray) -> tuple[float, float]:
    """The span of the finite values together with zero, never empty: bars start at zero."""
    good = values[np.isfinite(values)]
    low, high = float(good.min(initial=0.0)), float(good.max(initial=0.0))
    return (low, high) if high > low else (0.0, 1.0)


def number_format(values: np.ndarray) -> Spec:
    """How an axis or a legend writes its numbers: powers of ten where plain decimals would be long rows of zeros."""
    good = np.abs(values[np.isfinite(values)])
    largest = float(good.max(initial=0.0))
    return {"format": ".1e"} if largest and not SMALL <= largest < LARGE else {}


def color(title: str, values: np.ndarray, signed: bool, center: float = 0.0, length: float = 160) -> Spec:
    """The colour channel for a field ``value``: diverging around ``center`` or rising."""
    low, high = signed_domain(values, center) if signed else domain(values)
    scale: Spec = {"domain": [low, center, high] if signed else [low, high], "range": "diverging" if signed else "ramp"}
    scale["interpolate"] = "lab"
    if signed:
        scale |= {"domain": [low, high], "domainMid": center}
    legend = {"title": textwrap.wrap(title, 24), "gradientLength": min(200, max(60, length))}
    legend |= number_format(values)
    return {"field": "value", "type": "quantitative", "scale": scale, "legend": legend | {"tickCount": 5}}


def heat(
    x: Spec, y: Spec, colors: Spec, tooltip: Sequence[str], width: Spec, height: Spec, rising: bool, text: bool = False
) -> Spec:
    """A heat map over places ``x`` and ``y``: cells without a finite value are grey; ``text`` writes ``cell`` in each.

    ``rising`` puts place 0 of ``y`` at the bottom, as layers are drawn.
    """
    place = {
        "x": {"field": "x", "type": "ordinal", "axis": x},
        "y": {"field": "y", "type": "ordinal", "axis": y} | ({"sort": "descending"} if rising else {}),
        "tooltip": [{"field": each, "type": "nominal"} for each in tooltip]
        + [{"field": "shown", "type": "nominal", "title": colors["legend"]["title"]}],
    }
    layers: list[Spec] = [
        {
            "transform": [{"filter": "!isValid(datum.value)"}],
            "mark": {"type": "rect", "style": "missing"},
            "encoding": place,
        },
        {
            "transform": [{"filter": "isValid(datum.value)"}],
            "mark": {"type": "rect"},
            "encoding": {**place, "color": colors},
        },
    ]
    if text:
        for style, test in (("on_low", "!datum.high"), ("on_high", "datum.high")):
            layers.append(
                {
                    "transform": [{"filter": test}],
                    "mark": {"type": "text", "style": style, "fontSize": 10, "limit": width["step"] - 4},
                    "encoding": {**place, "text": {"field": "cell", "type": "nominal"}},
                }
            )
    return {"width": width, "height": height, "layer": layers}


def panels(body: Spec, labels: Sequence[Any], title: str, across: int) -> Spec:
    """``body`` repeated for every value of the field ``panel``, ``across`` of them in a row."""
    names = [shown(each, LONGEST_PANEL) for each in labels]
    header = {"title": title, "labelExpr": f"{json.dumps(names)}[datum.value]"}
    facet = {"field": "panel", "type": "ordinal", "header": header}
    return {"facet": facet, "columns": across, "spec": body}


def document(body: Spec, title: Spec) -> Spec:
    """A whole specification in the light theme; without data it says that there is nothing to draw."""
    if not body["data"]["values"]:
        mark = {"type": "text", "style": "faint", "fontSize": 12, "align": "left"}
        text = {"text": {"field": "text", "type": "nominal"}, "x": {"value": 0}}
        body = {"data": {"values": [{"text": EMPTY}]}, "mark": mark, "encoding": text, "width": 220, "height": 30}
    titled = {"title": title} if any(title["text"]) or title["subtitle"] else {}
    return {"$schema": SCHEMA, **titled, **body, "config": theme()}
