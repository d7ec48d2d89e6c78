"""Verify what Cutaway says of a model, with the measured error of each claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutaway.core.errors import CutawayError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Set, Zero
from cutaway.core.metric import Metric
from cutaway.core.site import KINDS
from cutaway.core.trace import Trace
from cutaway.models.handle import Model
from cutaway.models.plan import Layer, is_transposed
from cutaway.models.sites import refusals

if TYPE_CHECKING:
    from cutaway.results.table import Table

EXACT = 0.0
CLOSE = 1e-5
RESIDUAL = 1e-6
GRADIENT = 2e-2
STEPS = (1e-2, 1e-3, 3e-3, 1e-3, 3e-4)  # each along a direction of its own


@dataclass(frozen=True)
class Finding:
    """One claim about one model: what was measured, on how many places, and whether it holds.

    ``error`` is relative to the size of what is compared; ``tolerance`` is in the same measure.
    """

    claim: str
    error: float
    tolerance: float
    places: int
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is within tolerance; NaN never is."""
        return self.error <= self.tolerance


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest entry of the second."""
    scale = float(b.abs().max()) if b.numel() else 0.0
    difference = float((a.float() - b.float()).abs().max()) if b.numel() else 0.0
    return difference / scale if scale > 0 else difference


class Examination:
    """The checks of one model on one input; each is a method that yields findings."""

    def __init__(self, model: Model, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.anatomy = model.anatomy(inputs)
        self.scopes = [s for s in self.anatomy.stacks if not s or inputs.extra]
        self.plain = model(inputs)
        self.loose = 1.0 if model.dtype == torch.float32 else 1e4
        self.trace = self._everything()

    def _everything(self) -> Trace:
        want = [
            f"{prefix}L*.{k}"
            for prefix, layers in self._stacks()
            for k in KINDS
            if any(self._has(x, k) for x in layers)
        ]
        return self.model.trace(self.inputs, want=[*want, *self.anatomy.taps])

    def _stacks(self) -> Iterator[tuple[str, tuple[Layer, ...]]]:
        for scope in self.scopes:
            yield (f"{scope}/" if scope else ""), self.anatomy.stacks[scope]

    @staticmethod
    def _has(layer: Layer, kind: str) -> bool:
        return KINDS[kind].layered and layer.has(kind)

    def _layers(self) -> Iterator[tuple[str, Layer]]:
        for prefix, layers in self._stacks():
            for i, layer in enumerate(layers):
                yield f"{prefix}L{i}.", layer

    def findings(self) -> list[Finding]:
        """All findings, in the order of the checks."""
        checks: list[Callable[[], Iterator[Finding]]] = [
            self.same_logits, self.written_back, self.residual, self.rows, self.values, self.readout,
            self.neuron, self.head, self.expert, self.gradient,
        ]  # fmt: skip
        return [finding for check in checks for finding in check()]

    # -- the checks ---------------------------------------------------------------------------------------------------
    def same_logits(self) -> Iterator[Finding]:
        """Watched logits equal unwatched ones, bit for bit."""
        watched = self.trace.logits
        error = float("nan") if watched is None else float((watched - self.plain).abs().max())
        yield Finding("watched logits == unwatched logits", error, EXACT, len(self.trace))

    def written_back(self) -> Iterator[Finding]:
        """Writing every pattern back as it is leaves the logits: our way through attention is the model's."""
        sites = [
            f"{prefix}L*.attn.pattern"
            for prefix, layers in self._stacks()
            if any(x.has("attn.pattern") for x in layers)
        ]
        if sites:
            logits = self.model.trace(
                self.inputs, do=[Apply(site, lambda x, where: x.clone()) for site in sites]
            ).logits
            error = float("nan") if logits is None else relative(logits, self.plain)
            yield Finding("logits with patterns written back == logits", error, CLOSE * self.loose, len(sites))

    def residual(self) -> Iterator[Finding]:
        """resid_pre + attn.out + mlp.out == resid_post, through the layer's norms where it has them after the sums."""
        errors = []
        for at, layer in self._layers():
            if not (layer.has("attn.out") and layer.has("mlp.out")):
                continue
            x = self.trace[at + "resid_pre"]
            terms = [("mlp", "mlp.out")] if layer.parallel and not layer.norms else []
            terms = [("attn", "attn.out"), ("mlp", "mlp.out")] if not terms else [("attn", "attn.out"), *terms]
            for part, kind in terms:
                x = x + self.trace[at + kind]
                if part in layer.norms:
                    with torch.no_grad():
                        x = self.model.hf.get_submodule(layer.norms[part])(x)
                if part == "attn" and layer.has("resid_mid"):
                    errors.append(relative(x, self.trace[at + "resid_mid"]))
            errors.append(relative(x, self.trace[at + "resid_post"]))
        if errors:
            yield Finding(
                "resid_pre + attn.out + mlp.out == resid_post", max(errors), RESIDUAL * self.loose, len(errors)
            )

    def rows(self) -> Iterator[Finding]:
        """Pattern rows sum to 1; with attention sinks or gates, to no more than 1."""
        errors, sinks = [], 0
        for at, layer in self._layers():
            if layer.has("attn.pattern"):
                pattern = self.trace[at + "attn.pattern"].float()
                scores = self.trace[at + "attn.scores"].float()
                sums = pattern.sum(dim=-1)
                missing = float((1 - sums).max())
                if missing > 1e-3 and float(sums.max()) <= 1 + 1e-4:
                    sinks += 1
                    own = scores.softmax(dim=-1)
                    pattern = pattern / sums.clamp(min=1e-9)[..., None]
                    errors.append(relative(pattern, own))
                else:
                    errors.append(float((sums - 1).abs().max()))
        if errors:
            detail = f"{sinks} layers give part of every row to a sink" if sinks else ""
            yield Finding("pattern rows sum to 1", max(errors), CLOSE * self.loose, len(errors), detail)

    def values(self) -> Iterator[Finding]:
        """pattern @ v == z."""
        errors = []
        for at, layer in self._layers():
            if layer.has("attn.z"):
                pattern, v = self.trace[at + "attn.pattern"].float(), self.trace[at + "attn.v"].float()
                v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
                z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
                errors.append(relative(z, self.trace[at + "attn.z"]))
        if errors:
            yield Finding("pattern @ v == z", max(errors), CLOSE * self.loose, len(errors))

    def readout(self) -> Iterator[Finding]:
        """The last residual stream through the model's own norm and head gives its logits."""
        if "readout" in self.anatomy.refused or not self.anatomy.stacks[""][-1].has("resid_post"):
            return
        last = self.trace[f"L{len(self.anatomy.stacks['']) - 1}.resid_post"]
        yield Finding(
            "readout(last resid_post) == logits", relative(self.model.unembed(last), self.plain), CLOSE * self.loose, 1
        )

    def neuron(self) -> Iterator[Finding]:
        """Zeroing a neuron equals zeroing its outgoing weights."""
        errors = [
            self._ablation(
                f"{at}mlp.act[{layer.d_mlp // 2}]", layer.w_out, slice(layer.d_mlp // 2, layer.d_mlp // 2 + 1)
            )
            for at, layer in self._some("mlp.act")
        ]
        if errors:
            yield Finding(
                "ablating a neuron == zeroing its outgoing weights", max(errors), CLOSE * self.loose, len(errors)
            )

    def head(self) -> Iterator[Finding]:
        """Zeroing a head equals zeroing its slice of the output matrix."""
        errors = []
        for at, layer in self._some("attn.z"):
            if layer.w_o and layer.attention is not None:
                head, width = layer.attention.heads - 1, layer.attention.d_value
                errors.append(self._ablation(f"{at}attn.z[{head}]", layer.w_o, slice(head * width, (head + 1) * width)))
        if errors:
            yield Finding("ablating a head == zeroing its slice", max(errors), CLOSE * self.loose, len(errors))

    def expert(self) -> Iterator[Finding]:
        """Zeroing an expert's routing weight, or all its neurons, silences it: both runs agree up to its bias."""
        errors = []
        for at, layer in self._some("expert.act"):
            module = self.model.hf.get_submodule(layer.experts)
            if getattr(module, "has_bias", False):
                continue
            gate = self.model.trace(self.inputs, do=Zero(f"{at}expert.gate[0]")).logits
            acts = self.model.trace(self.inputs, do=Zero(f"{at}expert.act[0]")).logits
            if gate is not None and acts is not None:
                errors.append(relative(acts, gate))
        if errors:
            yield Finding(
                "silencing an expert's neurons == closing its gate", max(errors), CLOSE * self.loose, len(errors)
            )

    def gradient(self) -> Iterator[Finding]:
        """The gradient of a logit at a residual state agrees with a finite difference."""
        if self.model.dtype != torch.float32:
            return
        top = int(self.plain[0, self.inputs.last[0]].argmax())
        metric = self.model.metric(f"logit: #{top}")
        errors = []
        for at, _ in self._some("resid_post", last=False):
            site = f"{at}resid_post"
            trace = self.model.trace(self.inputs, want=site, grad=metric)
            if trace.grads is not None:
                draw = torch.Generator().manual_seed(0)
                # Rectifiers and routers have kinks: one of several draws must meet a smooth stretch.
                best = float("inf")
                for step in STEPS:
                    best = min(best, self._slope(site, trace, metric, step, draw))
                    if best <= GRADIENT:
                        break
                errors.append(best)
        if errors:
            yield Finding("gradient == finite difference", max(errors), GRADIENT, len(errors))

    def _slope(self, site: str, trace: Trace, metric: Metric, step: float, draw: torch.Generator) -> float:
        """Error of the predicted slope along a random direction, relative to the slope or a typical one."""
        x, g = trace[site], trace.grads[site]  # type: ignore[index]
        direction = torch.randn(x.shape, generator=draw).to(x)
        direction = direction / direction.norm() * x.norm()
        ends = [self.model.trace(self.inputs, do=Set(site, x + s * step * direction)).logits for s in (1, -1)]
        up, down = (float(metric(e, self.inputs)[0]) if e is not None else float("nan") for e in ends)
        predicted = float((g * direction).sum())
        typical = float(g.norm() * direction.norm()) / g.numel() ** 0.5
        return abs((up - down) / (2 * step) - predicted) / max(abs(predicted), typical, 1e-6)

    def _some(self, kind: str, last: bool = True) -> Iterator[tuple[str, Layer]]:
        """The first and (``last``) the last layer of each scope that have a kind."""
        for prefix, layers in self._stacks():
            have = [i for i, layer in enumerate(layers) if layer.has(kind)]
            for i in dict.fromkeys(have[:1] + (have[-1:] if last else [])):
                yield f"{prefix}L{i}.", layers[i]

    def _ablation(self, site: str, path: str, columns: slice) -> float:
        ablated = self.model.trace(self.inputs, do=Zero(site)).logits
        module = self.model.hf.get_submodule(path)
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows = weight.data if is_transposed(module) else weight.data.T
        kept = rows[columns].clone()
        try:
            rows[columns] = 0
            edited = self.model(self.inputs)
        finally:
            rows[columns] = kept
        return float("nan") if ablated is None else relative(ablated, edited)


def examine(model: Model, inputs: Inputs | None = None) -> list[Finding]:
    """What holds of a model, on ``inputs`` or a few tokens: one finding per claim, with its measured error.

    Raises:
        UnsupportedError: the model cannot be watched at all. WeightsError: its weights are not finite.
    """
    batch = inputs or model.encoder.image_sample() or model.encoder.sample()
    return Examination(model, batch).findings()


def doctor(model: Model, inputs: Inputs | None = None) -> Table:
    """A table of the claims that hold of a model and those that do not, with measured errors and tolerances.

    The checks: watched logits equal unwatched ones, also with every pattern written back; the residual identity;
    pattern rows; pattern @ v == z; the readout; ablating a neuron, a head or an expert against its weights; a gradient
    against a finite difference.
    """
    from cutaway.results.table import Table

    inputs = inputs or model.encoder.image_sample()
    found = examine(model, inputs)
    anatomy = model.anatomy(inputs)
    refused = sorted(f"{site}: {why}" for site, why in refusals(anatomy).items())
    return Table(
        title=f"doctor: {model.name} ({type(model.hf).__name__}, {model.dtype})",
        columns={
            "claim": [f.claim for f in found],
            "holds": ["yes" if f.holds else "NO" for f in found],
            "error": [f.error for f in found],
            "tolerance": [f.tolerance for f in found],
            "places": [f.places for f in found],
            "detail": [f.detail for f in found],
        },
        notes=tuple(f"refused: {line}" for line in refused),
    )


def sentence(error: BaseException) -> str:
    """One line of an error, its type in front unless it is ours."""
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return first if isinstance(error, CutawayError) else f"{type(error).__name__}: {first}"
