"""Model: one Hugging Face module, watched but never rewritten."""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.errors import InputError, ModelError, SiteMissingError, UnsupportedError
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Intervention, parse_intervention
from cutaway.core.metric import Metric
from cutaway.core.site import Site, SiteLike
from cutaway.core.trace import Trace
from cutaway.models.encode import Encoder
from cutaway.models.front import behind_attention, until_attention
from cutaway.models.plan import Anatomy, Layer, is_transposed
from cutaway.models.probe import probe
from cutaway.models.region import Window, window_of_call
from cutaway.models.selfcheck import check_watched, random_numbers_kept, spares_cache
from cutaway.models.sites import site_of_module
from cutaway.models.upstream import input_embeddings, inputs_explained
from cutaway.models.watch import Done, Stop, Watch, asleep

InterventionLike = Intervention | str


class Model:
    """A Hugging Face module with its tokenizer or processor.

    Args:
        hf: any causal-LM or image-text-to-text module. It is put in no mode and never changed.
        processor: its tokenizer or processor; without one, inputs are token ids.
        name: how results call it; the folder or hub id it came from.
    """

    def __init__(self, hf: nn.Module, processor: Any = None, name: str = "") -> None:
        if not isinstance(hf, nn.Module) or not hasattr(hf, "config"):
            raise ModelError("Model(hf)", f"got {type(hf).__name__}", "give a Hugging Face model, or call cutaway.load")
        self.hf = hf
        self.name = name or getattr(hf.config, "name_or_path", "") or type(hf).__name__
        self.encoder = Encoder(hf, processor)
        self._anatomy: Anatomy | None = None
        self._saw_image = False
        self._lock = threading.RLock()
        self._digest: tuple[int, str] | None = None
        takes = inspect.signature(hf.forward).parameters
        self._takes_cache = "use_cache" in takes
        self._may_take_cache = any(p.kind is p.VAR_KEYWORD for p in takes.values())

    # -- what it is ---------------------------------------------------------------------------------------------------
    @property
    def processor(self) -> Any:
        """The tokenizer or processor; None when inputs are token ids."""
        return self.encoder.processor

    @property
    def device(self) -> torch.device:
        """Where its inputs go: the device of its token embedding."""
        embeddings = input_embeddings(self.hf) or self.hf
        return next((p.device for p in embeddings.parameters()), next(self.hf.parameters()).device)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where its weights are; several when its layers are spread."""
        return tuple(dict.fromkeys(p.device for p in self.hf.parameters()))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of its weights."""
        return next(p.dtype for p in self.hf.parameters() if p.is_floating_point())

    @property
    def n_layers(self) -> int:
        """Layers of the language model."""
        return len(self.anatomy().stacks[""])

    @property
    def layers(self) -> Sequence[Layer]:
        """Plans of the language model's layers."""
        return self.anatomy().stacks[""]

    @property
    def digest(self) -> str:
        """Short hash of the class and of every weight, computed again when a weight was written to."""
        weights = self.hf.state_dict()
        state = hash(tuple((name, w.data_ptr(), w._version) for name, w in weights.items()))
        if self._digest is None or self._digest[0] != state:
            self._digest = state, weights_digest(type(self.hf).__name__, weights)
        return self._digest[1]

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {type(self.hf).__name__}, {self.dtype}, {self.device})"

    # -- inputs -------------------------------------------------------------------------------------------------------
    def inputs(self, prompt: Any, image: Any = None, *, padding_side: str = "right", template: bool = False) -> Inputs:
        """Inputs of a text, a list of texts, token ids, or Inputs (returned as they are); see ``Encoder.encode``."""
        return self.encoder.encode(prompt, image, padding_side=padding_side, template=template)

    def token(self, text: str | int) -> int:
        """The id of one token: its string, ``#11``, or an int. TokenError when the text is none or several."""
        return self.encoder.token(text)

    def decode(self, token: int) -> str:
        """The string of a token id; ``#11`` without a tokenizer."""
        return self.encoder.decode(token)

    def metric(self, metric: str | Metric) -> Metric:
        """The metric of a text form, or ``metric`` itself."""
        return metric if isinstance(metric, Metric) else Metric.parse(metric, self.encoder)

    # -- structure ----------------------------------------------------------------------------------------------------
    def anatomy(self, inputs: Inputs | None = None) -> Anatomy:
        """The structure of the model, read from one watched forward pass and checked at first use.

        The vision tower is read when ``inputs`` bring an image for the first time.

        Raises:
            UnsupportedError: the structure is not understood, or watching changes the logits.
            WeightsError: weights are not finite.
        """
        image = inputs is not None and inputs.has_images
        with self._lock:
            if self._anatomy is None or (image and not self._saw_image):
                self._read_anatomy(inputs if image and inputs is not None else self.encoder.sample(), image)
            return self._anatomy  # type: ignore[return-value]

    def _read_anatomy(self, sample: Inputs, image: bool) -> None:
        known = self._anatomy, self._saw_image
        try:
            with asleep(self.hf), inputs_explained(sample):
                if self._may_take_cache and not self._takes_cache:
                    self._takes_cache, self._may_take_cache = spares_cache(self, sample), False
                with random_numbers_kept(self.devices):
                    self._anatomy, self._saw_image = probe(self.hf, self._kwargs(sample)), image
                check_watched(self, sample)
        except BaseException:
            self._anatomy, self._saw_image = known
            raise

    def _site(self, text: str) -> Site | None:
        return site_of_module(text.strip(), self.anatomy()) if text.strip() in self._module_paths else None

    def _sites(self, sites: SiteLike | Iterable[SiteLike]) -> Iterator[tuple[str, Site]]:
        """Sites with the text that named them."""
        if isinstance(sites, Site):
            yield str(sites), sites
        elif isinstance(sites, str):
            for part in sites.split(","):
                if part.strip():
                    yield part.strip(), self._site(part) or Site.parse(part)
        else:
            for item in sites:
                yield from self._sites(item)

    def expand(self, sites: SiteLike | Iterable[SiteLike], inputs: Inputs | None = None) -> list[Site]:
        """The concrete sites (one layer each) that ``sites`` name in this model; module paths are names too."""
        anatomy = self.anatomy(inputs)
        return [
            self._meant(text, concrete)
            for text, site in self._sites(sites)
            for concrete in anatomy.expand(site, self.name)
        ]

    def _meant(self, text: str, site: Site) -> Site:
        """``site``, unless ``text`` is TransformerLens' name of another tensor in this model."""
        if text.endswith((".attn.hook_q", ".attn.hook_k")) and self.layers[site.layer].changes(site.kind):
            found = f"there it is before layer {site.layer} rotates, norms or scales it, which is no site here"
            raise SiteMissingError(f"site {text!r} of {self.name}", found, f"'{site}' is what attention uses")
        return site

    @cached_property
    def _module_paths(self) -> set[str]:
        return {path for path, _ in self.hf.named_modules() if path}

    # -- running ------------------------------------------------------------------------------------------------------
    def _kwargs(self, inputs: Inputs) -> dict[str, Any]:
        return {**inputs.kwargs(self.device), **({"use_cache": False} if self._takes_cache else {})}

    def _forward(self, inputs: Inputs) -> Any:
        with inputs_explained(inputs):
            return self.hf(**self._kwargs(inputs)).logits

    def __call__(self, inputs: Any) -> Tensor:
        """[batch, pos, vocab] logits of a plain forward pass; UnsupportedError when positions are not the prompt's."""
        batch = self.inputs(inputs)
        with torch.no_grad():
            logits: Tensor = self._forward(batch)
        if logits.shape[:2] != batch.ids.shape:
            found = f"its logits {list(logits.shape)} do not stand for the positions {list(batch.ids.shape)}"
            raise UnsupportedError(f"what {self.name} says of a prompt", found, "")
        return logits

    def trace(
        self,
        inputs: Any,
        want: SiteLike | Iterable[SiteLike] = (),
        do: InterventionLike | Iterable[InterventionLike] = (),
        grad: bool | str | Metric = False,
        *,
        stop: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Trace:
        """One watched forward pass: activations at ``want``, with ``do`` applied, and the logits.

        Args:
            inputs: a prompt, ids, or Inputs.
            want: sites to keep, e.g. ``"L*.resid_post, L3.attn.pattern[0-3]"``.
            do: interventions, or their text forms. Activations are kept as they are after them.
            grad: a metric (or its text): its gradient at every wanted site is in ``trace.grads``. True keeps the graph.
            stop: leave after the last layer that is wanted; ``logits`` is then None.
            device, dtype: of the stored activations; the model stays where it is.

        Raises:
            SiteError, InputError, InterventionError, UnsupportedError.
        """
        batch = self.inputs(inputs)
        metric = self.metric(grad) if isinstance(grad, str | Metric) else None
        if metric is not None:
            batch = metric.prepare(batch)
        sites = list(dict.fromkeys(self.expand(want, batch)))
        where = torch.device(device) if device is not None else None
        with torch.set_grad_enabled(bool(grad)):
            watch, logits = self.watched(
                batch,
                sites,
                do,
                attached=bool(grad),
                stop=stop and bool(sites) and metric is None,
                device=where,
                dtype=dtype,
            )
        missing = [s for s in sites if s not in watch.values]
        if missing:
            needs = "it did not run: the inputs bring no image" if not batch.extra else "it did not run in this pass"
            raise InputError(f"site '{missing[0]}'", needs, "give an image" if not batch.extra else "name another site")
        about: dict[str, Any] = {
            "depths": {s: len(x) for s, x in watch.anatomy.stacks.items()},
            "names": dict(self._sites(want)),
        }
        if metric is None or logits is None:
            return Trace(batch, watch.values, logits, **about)
        return self._with_gradients(watch, batch, logits, metric, about)

    def watched(
        self,
        inputs: Inputs,
        sites: Iterable[Site],
        do: InterventionLike | Iterable[InterventionLike] = (),
        *,
        attached: bool = False,
        stop: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Watch, Tensor | None]:
        """(the watch that one forward pass ran under, its logits): what ``trace`` is made of, for concrete sites.

        The logits are None when it stopped. ``attached`` keeps the graph, where the caller has gradients enabled.
        """
        watch = Watch(
            self.hf,
            self.anatomy(inputs),
            sites,
            self._do(do, inputs),
            window=Window(inputs, inputs.real),
            attached=attached,
            device=device,
            dtype=dtype,
            stop=stop,
        )
        with watch:
            try:
                logits: Tensor = self._forward(inputs)
            except Stop:
                return watch, None
        return watch, logits

    def _with_gradients(
        self, watch: Watch, batch: Inputs, logits: Tensor, metric: Metric, about: dict[str, Any]
    ) -> Trace:
        value = metric(logits, batch)
        grads = watch.gradients(value.sum())
        values = {site: x.detach() for site, x in watch.values.items()}
        return Trace(batch, values, logits.detach(), grads, value.detach(), **about)

    def _do(
        self, do: InterventionLike | Iterable[InterventionLike], inputs: Inputs | None = None, growing: bool = False
    ) -> list[Done]:
        items = [do] if isinstance(do, str | Intervention) else list(do)
        parsed = [parse_intervention(item) if isinstance(item, str) else item for item in items]
        named = [(item, self._site(item.at) if isinstance(item.at, str) else None) for item in parsed]
        placed = [item if site is None else replace(item, at=site) for item, site in named]
        return [Done(site, item, growing) for item in placed for site in self.expand(item.at, inputs)]

    @contextmanager
    def doing(self, do: InterventionLike | Iterable[InterventionLike], inputs: Inputs | None = None) -> Iterator[Model]:
        """Interventions around any code of this thread that runs ``self.hf``, ``generate`` with its KV cache included.

        Positive positions count the real tokens from the start of each row; negative ones count from the end of what
        each call sees, so ``@-1`` acts on every generated token. Blocks may be nested: the outer one acts first.

        Args:
            do: interventions, or their text forms.
            inputs: inputs with an image, from which the vision tower is read if none was seen before.
        """
        done = self._do(do, inputs, growing=True)
        watch = Watch(self.hf, self.anatomy(), (), done, window=Window(None, [], growing=True))
        names = list(inspect.signature(self.hf.forward).parameters)

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if watch.on():
                watch.window = window_of_call({**dict(zip(names, args, strict=False)), **(kwargs or {})})

        handle = self.hf.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            with watch:
                yield self
        finally:
            handle.remove()

    def until_attention(self, layer: int, args: Any, kwargs: Any, x: Tensor) -> dict[str, Tensor]:
        """What a layer, called so, would attend with if ``x`` entered it; see ``cutaway.models.front``."""
        return until_attention(self.hf, self.anatomy(), layer, args, kwargs, x)

    def behind_attention(self, layer: int, args: Any, kwargs: Any, x: Tensor, z: Tensor) -> Tensor:
        """What that layer's output matrix would read if its heads gave ``z``; see ``cutaway.models.front``."""
        return behind_attention(self.hf, self.anatomy(), layer, args, kwargs, x, z)

    # -- weights and readout ------------------------------------------------------------------------------------------
    def weight(self, site: SiteLike) -> Tensor:
        """What the named neurons or heads write into the residual stream, before any norm on the way.

        ``L3.mlp.act[7]``: [neuron, d_model]. ``L3.attn.z[5]``: [head, d_value, d_model].

        Raises:
            UnsupportedError: other kinds, or a layer whose output matrix is not one module.
        """
        (concrete,) = self.expand(site)
        layer = self.anatomy().stacks[concrete.scope][concrete.layer]
        path = {"mlp.act": layer.w_out, "attn.z": layer.w_o}.get(concrete.kind, "")
        if not path:
            raise UnsupportedError(f"weight '{concrete}'", "it has no single output matrix", "name mlp.act or attn.z")
        module = self.hf.get_submodule(path)
        matrix: Tensor = module.weight  # type: ignore[assignment]
        rows = matrix if is_transposed(module) else matrix.T
        if concrete.kind == "attn.z" and layer.attention is not None:
            rows = rows.reshape(layer.attention.heads, layer.attention.d_value, -1)
        if concrete.index is None:
            return rows.detach()
        return rows[concrete.index.resolve(rows.shape[0], "index", f"weight '{concrete}'")].detach()

    def readout(self, resid: Tensor) -> Tensor:
        """[..., vocab] log-probabilities of residual states [..., d_model], through the model's own norm and head.

        Raises:
            UnsupportedError: the way from the last residual stream to the logits could not be told.
        """
        return self.unembed(resid).float().log_softmax(dim=-1)

    def unembed(self, resid: Tensor) -> Tensor:
        """[..., vocab] logits of residual states [..., d_model], through the model's own norm and head."""
        anatomy = self.anatomy()
        if "readout" in anatomy.refused:
            raise UnsupportedError(
                f"readout of {type(self.hf).__name__}", anatomy.refused["readout"], "read sites instead"
            )
        x = resid.to(self.device, self.dtype).reshape(1, -1, resid.shape[-1])
        with torch.no_grad():
            for step in anatomy.tail:
                x = step.run(self.hf, x)
        return x.reshape(*resid.shape[:-1], x.shape[-1])


def weights_digest(name: str, weights: Mapping[str, Tensor]) -> str:
    """Short hash of named weights: a checksum over all of each, and a sample that knows the order."""
    h = hashlib.sha256(name.encode())
    for key, weight in weights.items():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)].float().cpu().numpy().tobytes()
        whole = int(torch.hash_tensor(flat).view(torch.int64)) if flat.numel() else 0
        h.update(f"{key}{tuple(weight.shape)}{weight.dtype}{whole}".encode() + sample)
    return h.hexdigest()[:16]
