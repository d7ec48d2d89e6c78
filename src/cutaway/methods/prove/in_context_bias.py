"""In-context bias: how the answer leans to the more frequent and to the later label, and what takes that away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import ParameterError, UnsupportedError
from cutaway.core.intervention import Intervention
from cutaway.core.method import method
from cutaway.core.params import Prompts, Sites, Target
from cutaway.core.proof import Check
from cutaway.models.handle import Model
from cutaway.ops.labelled import Labelled, again, labelled, last_logits, margin
from cutaway.ops.towers import offsets, recency_slope, shortcut, without_positions
from cutaway.ops.units import Unit
from cutaway.results.ranking import Ranking
from cutaway.results.table import Table

Mitigation = Callable[[Model, Labelled, Sequence[Unit]], Sequence[Intervention]]
Row = tuple[str, tuple[float, ...]]
NONE, CALIBRATED = "none", "contextual calibration"
COLUMNS = ("accuracy", "lean", "accuracy spread", "attention slope")
UNTOUCHED = 1e-4  # of the logits: a mitigation of weight zero changes no more
PROMPTS = '["#70 #71 #80 #72 #81 #71 #73", "#74 #72 #75 #71 #79 #72 #76"]'


@method(
    cites=("yu2024towers", "zhao2021calibrate"),
    example={"prompts": PROMPTS, "labels": "#71, #72, #81, #83", "sites": "L1.attn.z[0-1]", "orders": 3},
)
def in_context_bias(
    model: Model,
    prompts: Prompts,
    labels: list[Target],
    ranking: Ranking | None = None,
    sites: Sites | None = None,
    gold: list[Target] | None = None,
    orders: Annotated[int, annotated_types.Ge(2)] = 6,
    a_c: float = 0.03,
    neutral: Target | None = None,
    seed: int = 0,
) -> Table:
    """How far the answer leans to the majority label and to the later label, plain and under each mitigation.

    Majority: prompts that show one label more often, or each prompt with one example less. The lean is log p of the
    label shown most less that of the one shown least. Recency: the examples in several random orders; the lean is the
    standard deviation of the margin over orders. The mitigations act on the in-context heads alone, at the last
    position.

    Source: Yu and Ananiadou (2024), "How do large language models learn in-context?", section 5; Zhao et al. (2021),
    "Calibrate before use".

    Args:
        prompts: texts or ids, each with examples, and at its end what is asked.
        labels: the tokens that are labels; each prompt shows two of them or more.
        ranking: in-context heads, as ``in_context_heads`` finds them.
        sites: heads (attn.z), instead of a ranking.
        gold: the right label of each prompt; the model's own choice among those shown when it is not given.
        orders: random orders of each prompt's examples.
        a_c: the paper's fixed weight of the shortcut.
        neutral: the token that stands for what is asked in contextual calibration; the unknown or padding token when it
            is not given.
        seed: of the orders.

    Returns:
        one row per experiment and mitigation: accuracy; the lean in nats; how far accuracy spreads (majority: prompts
        whose right label is shown most, less those whose is not; recency: standard deviation over orders); and for
        recency the nats of attention that the heads' labels gain per position.

    Raises:
        ParameterError: neither or both of ranking and sites, or they name no head. InputError: a prompt that shows
        fewer than two labels.
    """
    heads = _heads(model, ranking, sites)
    shown = labelled(model, model.inputs(prompts), labels, gold)
    blank = _blank(model) if neutral is None else neutral
    uneven = [p for prompt in shown for p in _uneven(model, prompt)]
    rows = [("majority", *row) for row in _majority(model, uneven, heads, a_c, blank)]
    notes = [f"majority: {len(uneven)} prompts with unequal labels, of {len(shown)}"]
    generator = torch.Generator().manual_seed(seed)
    arranged = [
        [again(model, prompt, torch.randperm(len(prompt.shots), generator=generator).tolist()) for _ in range(orders)]
        for prompt in shown
    ]
    found, refused = _recency(model, arranged, heads, blank)
    rows += [("recency", *row) for row in found]
    notes += [f"recency: {orders} orders of each prompt", *refused]
    notes.append(f"heads: {', '.join(map(str, heads))}; calibration asks {model.decode(blank)!r}")
    nothing = last_logits(model, shown[0].inputs, offsets(shown[0], heads, {}))
    return Table(
        title=f"bias of in-context labels in {model.name}",
        columns={
            "experiment": [row[0] for row in rows],
            "mitigation": [row[1] for row in rows],
            **{name: torch.tensor([row[2][n] for row in rows]) for n, name in enumerate(COLUMNS)},
        },
        units={"lean": "nats", "attention slope": "nats per position"},
        check=Check(
            name="an offset of zero changes nothing",
            value=float((nothing - last_logits(model, shown[0].inputs)).abs().max()),
            tolerance=max(UNTOUCHED, 8 * torch.finfo(model.dtype).eps) * max(1.0, float(nothing.abs().max())),
        ),
        notes=tuple(notes),
    )


def _heads(model: Model, ranking: Ranking | None, sites: Any) -> list[Unit]:
    if (ranking is None) == (sites is None):
        found = "neither is given" if ranking is None else "both are given"
        raise ParameterError("parameters 'ranking' and 'sites'", found, "give one of them")
    if ranking is not None:
        kinds = ranking.columns.get("kind", ["?"] * len(ranking))
        units = [Unit.parse(item) for item, kind in zip(ranking.items, kinds, strict=True) if kind]
    else:
        units = [u for site in model.expand(sites or ()) for u in Unit.of_site(site, model.anatomy())]
    if not units or any(unit.kind != "attn.z" or unit.inner >= 0 or unit.source >= 0 for unit in units):
        raise ParameterError("in-context heads", f"{', '.join(map(str, units)) or 'none'} are named", "name heads")
    return units


def _blank(model: Model) -> int:
    unknown = getattr(model.encoder.tokenizer, "unk_token_id", None)
    return unknown if isinstance(unknown, int) else model.encoder.pad_id


def _uneven(model: Model, prompt: Labelled) -> list[Labelled]:
    """The prompt if it shows labels unequally often, else all prompts with one example less that still show two."""
    if len(set(prompt.counts.values())) > 1:
        return [prompt]
    n = len(prompt.shots)
    orders = [[i for i in range(n) if i != left] for left in range(n)]
    fewer = [order for order in orders if len({prompt.labels[i] for i in order}) > 1]
    return [again(model, prompt, order) for order in fewer]


def _weights(prompt: Labelled, weight: Callable[[float], float]) -> dict[int, float]:
    """A weight for every label that is shown less often than the most frequent one, of how often that one is shown."""
    most = max(prompt.counts.values())
    return {label: weight(most / n) for label, n in prompt.counts.items() if n < most}


def _calibrated(model: Model, prompt: Labelled, blank: int) -> Tensor:
    """[vocab] log p, less log p when a neutral token stands for what is asked."""
    row = prompt.inputs
    ids = row.ids[0].tolist()
    start = prompt.shots[-1][1]
    neutral = last_logits(model, model.inputs([[*ids[:start], *[blank] * (len(ids) - start)]]))
    return last_logits(model, row).log_softmax(-1) - neutral.log_softmax(-1)


def _majority(model: Model, prompts: Sequence[Labelled], heads: Sequence[Unit], a_c: float, blank: int) -> list[Row]:
    """Per mitigation: accuracy, lean to the majority label, how far accuracy falls when it is the wrong one."""
    ways: dict[str, Mitigation | None] = {
        NONE: lambda m, p, h: (),
        f"shortcut, fixed weight {a_c:g}": lambda m, p, h: [shortcut(m, p, h, _weights(p, lambda r: a_c * r))],
        "shortcut, weight in closed form": lambda m, p, h: [shortcut(m, p, h, _weights(p, lambda r: r - 1))],
        "attention offset": lambda m, p, h: offsets(p, h, _weights(p, math.log)),
        CALIBRATED: None,
    }
    rows: list[Row] = []
    for name, way in ways.items():
        leans, right, by_most = [], [], []
        for prompt in prompts:
            logits = (
                _calibrated(model, prompt, blank) if way is None else _run(model, prompt, way(model, prompt, heads))
            )
            most = max(prompt.counts, key=lambda i: prompt.counts[i])
            least = min(prompt.counts, key=lambda i: prompt.counts[i])
            leans.append(float(logits[most] - logits[least]))
            right.append(margin(logits, prompt) > 0)
            by_most.append(prompt.gold == most)
        shares = [[r for r, m in zip(right, by_most, strict=True) if m is is_most] for is_most in (True, False)]
        spread = _mean(shares[0]) - _mean(shares[1]) if all(shares) else float("nan")
        rows.append((name, (_mean(right), _mean(leans), spread, float("nan"))))
    return rows


def _run(model: Model, prompt: Labelled, do: Sequence[Intervention]) -> Tensor:
    return last_logits(model, prompt.inputs, do)


def _recency(
    model: Model, arranged: list[list[Labelled]], heads: Sequence[Unit], blank: int
) -> tuple[list[Row], list[str]]:
    """Per mitigation: accuracy, spread of margins and of accuracy over orders, slope of the heads' attention."""
    rows: list[Row] = []
    notes: list[str] = []
    for name in (NONE, "positions left out", CALIBRATED):
        margins, slopes = [], []
        try:
            for orders in arranged:
                logits, attention = [], []
                for prompt in orders:
                    do = without_positions(model, prompt, heads) if name == "positions left out" else []
                    attention.append(_attention(model, prompt, heads, do))
                    logits.append(_calibrated(model, prompt, blank) if name == CALIBRATED else _run(model, prompt, do))
                margins.append([margin(each, prompt) for each, prompt in zip(logits, orders, strict=True)])
                slopes.append(_slope(orders, attention, len(heads)))
        except UnsupportedError as error:
            notes.append(f"'{name}' is left out: {error}")
            continue
        found = torch.tensor(margins)
        right = (found > 0).float()
        slope = float("nan") if name == CALIBRATED else _mean(slopes)
        lean, spread = found.std(1).mean(), right.mean(0).std()
        rows.append((name, (float(right.mean()), float(lean), float(spread), slope)))
    return rows, notes


def _attention(model: Model, prompt: Labelled, heads: Sequence[Unit], do: Sequence[Intervention]) -> Tensor:
    """[head, label position] from the last position."""
    want = [f"L{unit.layer}.attn.pattern[{unit.number}]@-1" for unit in heads]
    trace = model.trace(prompt.inputs, want=want, do=do, stop=True)
    return torch.stack([trace[site][0, 0, 0, list(prompt.places)].float().cpu() for site in want])


def _slope(orders: Sequence[Labelled], attention: Sequence[Tensor], heads: int) -> float:
    """Mean over heads of the slope over positions, each example followed through the orders."""
    first = orders[0].inputs.ids[0].tolist()
    names = [tuple(first[a:b]) for a, b in orders[0].shots]
    if len(set(names)) < len(names):
        return float("nan")  # equal examples cannot be told apart
    y, x = [], []
    for prompt, seen in zip(orders, attention, strict=True):
        ids = prompt.inputs.ids[0].tolist()
        at = [[tuple(ids[a:b]) for a, b in prompt.shots].index(name) for name in names]
        y.append(seen[:, at])
        x.append(torch.tensor(prompt.places)[at].float())
    return _mean([recency_slope(torch.stack(y)[:, h], torch.stack(x)) for h in range(heads)])


def _mean(values: Sequence[float]) -> float:
    kept = [v for v in values if v == v]
    return sum(kept) / len(kept) if kept else float("nan")
