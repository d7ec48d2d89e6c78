"""Gradients of a metric at any sites: one forward and one backward pass, weights frozen, only what is read unembedded.

with differentiable(model, inputs, "L*.attn.z, L*.mlp.act") as run:
    grads = run.gradients(metric)              # {site: gradient of the metric summed over rows}
run.values                                     # {site: activation}, there afterwards too
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cutaway.core.errors import InputError, ParameterError, SiteMissingError
from cutaway.core.inputs import Inputs
from cutaway.core.metric import Metric
from cutaway.core.site import Items, Site, SiteLike
from cutaway.engine.readout import Readout, each_of
from cutaway.models.handle import InterventionLike, Model
from cutaway.models.watch import Watch

WHOLE = 2**62
"""Bytes for scoring: all rows at once, since their graph is kept anyway."""


@contextmanager
def frozen(hf: nn.Module) -> Iterator[None]:
    """While open, no parameter asks for a gradient; the flags are put back, also after an exception."""
    asking = [p for p in hf.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


class Run:
    """One forward pass with its graph.

    Attributes:
        inputs: what ran. values: {site: activation} at the sites that were wanted, without their graph.
    """

    def __init__(self, model: Model, inputs: Inputs, watch: Watch, end: Tensor, states: bool) -> None:
        self.model, self.inputs = model, inputs
        self.values = {site: x.detach() for site, x in watch.values.items()}
        self._watch, self._end, self._states = watch, end, states

    def metric(self, metric: Metric | Sequence[Metric]) -> Tensor:
        """[batch] the metric, or each row's own, with its graph; metrics of rows read the same positions."""
        each = [metric] if isinstance(metric, Metric) else metric
        read, readout = self._read(each[0]), Readout(self.model, each[0], 1, WHOLE)
        if all(one is each[0] for one in each):
            return readout.score(read) if self._states else each[0].of(read)
        return readout.score_each(read, each) if self._states else each_of(read, each)

    @torch.no_grad()
    def value(self, metric: Metric) -> float:
        """The metric of the first row."""
        return float(self.metric(metric)[0])

    @torch.no_grad()
    def logits(self, metric: Metric) -> Tensor:
        """[batch, read, vocab] logits of the positions that a metric reads, without their graph."""
        read = self._read(metric).detach()
        return Readout(self.model, metric, 1, WHOLE).logits(read) if self._states else read

    def gradients(self, metric: Metric | Sequence[Metric]) -> dict[Site, Tensor]:
        """{site: gradient} of the sum over rows of the metric, or of each row's own, at every wanted site; once."""
        of = self.metric(metric).sum()
        if not of.requires_grad:
            found = "it counts, so that it has no gradient"
            named = metric if isinstance(metric, Metric) else metric[0]
            raise ParameterError(f"metric '{named}'", found, "use logit_diff, logit, logprob or loss")
        return self._watch.gradients(of)

    def _read(self, metric: Metric) -> Tensor:
        """[batch, read, ...] the last residual stream, or the logits where its way to them is not known."""
        at = torch.tensor(metric.reads(self.inputs), device=self._end.device)
        return self._end[torch.arange(len(self.inputs), device=self._end.device)[:, None], at]


@contextmanager
def differentiable(
    model: Model,
    inputs: Inputs,
    want: SiteLike | Iterable[SiteLike],
    do: InterventionLike | Iterable[InterventionLike] = (),
) -> Iterator[Run]:
    """A forward pass whose gradients can be taken while the block is open; weights are frozen in it.

    Args:
        inputs: prepared (``metric.prepare``), of one or several rows.
        want: the sites where values and gradients are wanted.
        do: interventions. One that replaces what is wanted cuts it off from what came before, as it does in the run.

    Raises:
        InputError: a site did not run. SiteError: it is not there.
    """
    with frozen(model.hf), torch.enable_grad():
        yield _run(model, inputs, want, do, attached=True)


@torch.no_grad()
def observe(
    model: Model,
    inputs: Inputs,
    want: SiteLike | Iterable[SiteLike],
    do: InterventionLike | Iterable[InterventionLike] = (),
) -> Run:
    """The same without a graph: values at sites, and metrics for which only what they read is unembedded."""
    return _run(model, inputs, want, do, attached=False)


def _run(
    model: Model,
    inputs: Inputs,
    want: SiteLike | Iterable[SiteLike],
    do: InterventionLike | Iterable[InterventionLike],
    *,
    attached: bool,
) -> Run:
    anatomy = model.anatomy(inputs)
    sites = list(dict.fromkeys(model.expand(want, inputs)))
    states = bool(anatomy.tail) and "readout" not in anatomy.refused and all(s.kind != "final_norm" for s in sites)
    end = Site("resid_post", Items.of(model.n_layers - 1))
    both = dict.fromkeys([*sites, *([end] if states else [])])
    watch, logits = model.watched(inputs, both, do, attached=attached, stop=states)
    missing = next((s for s in both if s not in watch.values), None)
    if missing is not None:
        raise InputError(f"site '{missing}'", "it did not run in this pass", "name another site")
    found = watch.values[end] if states else logits
    if found is None:
        raise SiteMissingError("logits", "the model returned none", "")
    return Run(model, inputs, watch, found, states)
