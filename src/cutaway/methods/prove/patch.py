"""Activation patching: which activations carry the difference between two prompts."""

from __future__ import annotations

from typing import Literal

from cutaway.core.errors import ParameterError
from cutaway.core.method import method
from cutaway.core.params import Count, Image, Layers, MetricLike, Positions, Prompt
from cutaway.core.proof import Check
from cutaway.engine.patching import Cells, Direction, Exchange, Kind
from cutaway.engine.replay import BUDGET, replay
from cutaway.models.handle import Model
from cutaway.results.grid import Grid


@method(
    cites="zhang2024patching",
    example={"clean": "#5 #9 #6 #7", "corrupt": "#5 #4 #6 #7", "metric": "logit_diff: #11, #22"},
)
def patch(
    model: Model,
    clean: Prompt,
    corrupt: Prompt,
    metric: MetricLike,
    kind: Kind = "resid_pre",
    by: Literal["position", "head", "neurons"] = "position",
    layers: Layers | None = None,
    positions: Positions = "all",
    blocks: Count = 16,
    direction: Direction = "clean->corrupt",
    normalise: bool = True,
    clean_image: Image | None = None,
    corrupt_image: Image | None = None,
    budget: Count = BUDGET,
) -> Grid:
    """The metric after putting one activation of one run into the other, for every layer and position, head or block.

    With ``clean->corrupt`` the corrupt prompt runs and receives clean activations: what restores the answer? With
    ``corrupt->clean`` the clean prompt runs and is damaged. Normalised, 0 is the run that receives and 1 the run that
    gives. Runs are replayed: what an intervention cannot change is not computed again. The check recomputes the
    strongest cell in a whole forward pass.

    Source: Zhang and Nanda (2024), "Towards best practices of activation patching in language models".

    Args:
        clean: text or ids of the prompt whose answer is right.
        corrupt: text or ids of equal token length.
        metric: what is measured, e.g. ``logit_diff: #11, #22``.
        kind: the kind of site that is patched.
        by: one cell per position, per head (at all ``positions``) or per block of neurons (likewise).
        layers: the layers to patch; all that have the kind when it is not given.
        positions: the positions to patch.
        blocks: into how many blocks neurons are divided.
        direction: which run gives and which receives.
        normalise: divide by the difference of the two runs.
        clean_image: image of the clean prompt.
        corrupt_image: image of the corrupt prompt; the clean one when it is not given.
        budget: bytes that the replayed rows may take.

    Returns:
        normalised recovery, or the metric in its unit, [layer, position | head | block].

    Raises:
        MismatchError: prompts of different token length, naming the tokens. ParameterError: ``by`` does not fit the
        kind, or both runs give the same value. InputError: several prompts.
    """
    exchange = Exchange.of(model, clean, corrupt, metric, direction, (clean_image, corrupt_image))
    measure, receiver = exchange.metric, exchange.receiver
    cells = Cells.of(model, kind, by, layers, positions, blocks, exchange.prompt)
    source = model.trace(exchange.giver, want=cells.sites)
    sweep = cells.patches(source, exchange.giver)
    found = replay(model, exchange.prompt, sweep, measure, budget=budget)
    values = found.values.float().cpu()
    base = float(found.base)
    given = exchange.scored(source.logits, exchange.giver)
    strongest = int((values - base).abs().argmax())
    error = abs(exchange.scored(model.trace(receiver, do=sweep[strongest]).logits, receiver) - float(values[strongest]))
    if normalise and abs(given - base) < 1e-6:
        raise ParameterError(
            f"metric '{measure}'", f"both runs give {base:.6g}", "choose prompts that differ in it, or normalise=False"
        )
    grid = (values - base) / (given - base) if normalise else values
    return Grid(
        title=f"{kind} patched {direction} in {model.name}",
        values=grid.reshape(len(cells.rows), -1),
        axes=("layer", cells.axis),
        measure="normalised recovery" if normalise else str(measure),
        unit="1 = the run that gives" if normalise else measure.unit,
        center=0.0 if normalise else base,
        labels={"layer": cells.layers, cells.axis: cells.labels},
        check=Check(
            name="the strongest cell, in a whole forward pass",
            value=error,
            tolerance=1e-4 * max(1.0, abs(given - base)),
        ),
        notes=(
            f"{measure}: {base:.6g} in the run that receives, {given:.6g} in the run that gives ({measure.unit})",
            f"how: {found.how}",
        ),
    )
