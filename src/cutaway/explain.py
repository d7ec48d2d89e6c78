"""The guided tour over one prompt: see, locate, prove, and tell it. The only place that composes methods."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import annotated_types

from cutaway.core.errors import CutawayError, ParameterError, UnsupportedError, broke
from cutaway.core.method import method
from cutaway.core.params import Count, Image, Prompt, Target
from cutaway.core.progress import track
from cutaway.core.proof import Proof
from cutaway.core.result import Result
from cutaway.methods.locate.image_patches import image_patches
from cutaway.methods.locate.logit_flow import logit_flow
from cutaway.methods.locate.neuron_attribution import neuron_attribution
from cutaway.methods.locate.neuron_projection import neuron_projection
from cutaway.methods.locate.query_neurons import query_neurons
from cutaway.methods.see.logit_lens import logit_lens
from cutaway.models.handle import Model
from cutaway.models.remembered import Remembered
from cutaway.ops.ablation import Ablation
from cutaway.ops.draws import UNASKED, worthwhile
from cutaway.ops.parts import unpadded
from cutaway.ops.proofs import JOINT, prove_together
from cutaway.ops.units import Unit
from cutaway.results.explanation import Explanation
from cutaway.results.imagemap import ImageMap
from cutaway.results.ranking import Ranking
from cutaway.results.telling.caveats import DROP, caveats
from cutaway.results.telling.words import NOUNS, short, story
from cutaway.results.telling.words import token as quoted

ANSWERS = 5
PATCHES = "image_patches"  # left out where there is no image
WHOLE = ("heads", "ffn_neurons")  # what the proof of the whole takes away together
EVERYTHING = 1_000_000  # more than any model has of heads and layers


@dataclass(frozen=True)
class Asked:
    """What the parts are made from.

    Attributes:
        prompt, image: as they were given. target: the token that is explained. versus: its rival.
        k: how many components a part names. draws, seed: of the proofs that a part makes itself.
        found: the parts made so far, by name.
    """

    model: Model
    prompt: Any
    image: Any
    target: int
    versus: int | None
    k: int
    draws: int
    seed: int
    found: dict[str, Any]

    @property
    def scored(self) -> dict[str, Any]:
        """What the scores of every part are of."""
        return {"image": self.image, "target": self.target, "versus": self.versus}

    def located(self, level: Any, k: int = 0) -> Result:
        """What components of a level add; the proof of all levels is made together."""
        return neuron_attribution(self.model, self.prompt, **self.scored, level=level, k=k or self.k, draws=0)

    def need(self, name: str) -> Any:
        """A part that was made before; UnsupportedError when it was refused."""
        if name not in self.found:
            found = f"it starts from the part {name.replace('_', ' ')}, which is missing"
            raise UnsupportedError("", found, "")
        return self.found[name]


def _lens(asked: Asked) -> Result:
    return logit_lens(asked.model, asked.prompt, image=asked.image, target=asked.target, positions=-1)


def _writes(asked: Asked) -> Result:
    return neuron_projection(
        asked.model, asked.prompt, asked.need("ffn_neurons"), image=asked.image, target=asked.target, most=asked.k
    )


def _queries(asked: Asked) -> Result:
    return query_neurons(asked.model, asked.prompt, **asked.scored, k=asked.k, verify=asked.k, draws=0)


def _flow(asked: Asked) -> Result:
    return logit_flow(asked.model, asked.prompt, **asked.scored, draws=asked.draws, curve=False, seed=asked.seed)


def _patches(asked: Asked) -> Result:
    return image_patches(asked.model, asked.prompt, **asked.scored, k=asked.k, draws=asked.draws, seed=asked.seed)


PARTS: dict[str, Callable[[Asked], Result]] = {
    "lens": _lens,
    "layers": lambda asked: asked.located("layer", EVERYTHING),
    "heads": lambda asked: asked.located("head", EVERYTHING),
    "head_positions": lambda asked: asked.located("head-position"),
    "ffn_neurons": lambda asked: asked.located("neuron"),
    "attention_neurons": lambda asked: asked.located("attention-neuron"),
    "writes": _writes,
    "query_neurons": _queries,
    "logit_flow": _flow,
    PATCHES: _patches,
}
"""How each part is made, in the order in which they need one another."""


@method(cites=("yu2024neuron", "nostalgebraist2020logitlens"), example={"prompt": "#5 #9 #6 #7 #8", "k": 3})
def explain(
    model: Model,
    prompt: Prompt,
    image: Image | None = None,
    target: Target | None = None,
    versus: Target | None = None,
    k: Count = 10,
    draws: Annotated[int, annotated_types.Ge(5)] = 5,
    seed: int = 0,
) -> Explanation:
    """What produced an answer: heads, neurons and image patches, with their proof.

    Every set of components that is named is taken away, and the drop compared with that of random sets of the same
    kinds and layers. A part that the model refuses is left out with its reason, and the rest goes on.

    Args:
        prompt: text or token ids.
        image: an image that goes with the prompt.
        target: the token to explain; the model's own answer when it is not given.
        versus: a rival token: scores and proofs are then of the logit difference.
        k: how many components each part names.
        draws: random sets that each named one is compared with.
        seed: of the random sets.

    Returns:
        the parts by name, with the story that they tell, its caveats and its proofs.

    Raises:
        InputError: a prompt, image or token that cannot be used.
        UnsupportedError: a model whose structure is not understood.
    """
    batch = unpadded(model.inputs(prompt, image))
    model.anatomy(batch)
    seen = Remembered.of(model, batch)
    seen.prefetch(batch)
    logp = seen(batch)[0, batch.last[0]].float().log_softmax(-1)
    best = logp.topk(min(ANSWERS, len(logp)))
    token = int(best.indices[0]) if target is None else target
    if token == versus:
        hint = "name another rival" if target is None else "name two tokens"
        raise ParameterError("parameter 'versus'", f"it is the token that is explained, {model.decode(token)!r}", hint)
    asked = Asked(seen, prompt, image, token, versus, k, draws, seed, {})
    refused = _make(asked, [name for name in PARTS if name != PATCHES or batch.has_images])
    ablation = Ablation(seen, batch, [token], rival=versus)
    found, unproved, whole = _proved(asked, ablation)
    told = Explanation(
        title=f"what makes {short(model.name)} say {quoted(model.decode(token))}",
        model=model.name,
        prompt=prompt if isinstance(prompt, str) else "".join(batch.tokens[0]),
        tokens=list(batch.tokens[0]),
        roles=list(batch.roles[0]),
        answers=[model.decode(int(i)) for i in best.indices],
        answer_log_probs=best.values,
        image=ImageMap.png(batch.images[0]) if batch.images else None,
        target=model.decode(token),
        log_prob=float(logp[token]),
        rank=int((logp > logp[token]).sum()),
        versus="" if versus is None else model.decode(versus),
        parts=found,
        refused=refused,
        proof=whole,
        notes=tuple(f"no proof of the {name.replace('_', ' ')}: {why}" for name, why in unproved.items()),
    )
    return told.replace(story=story(told), caveats=caveats(told))


def _make(asked: Asked, names: Sequence[str]) -> dict[str, str]:
    """Makes the parts; why some are missing, by name."""
    refused: dict[str, str] = {}
    for name in track(names, "explaining", total=len(names)):
        try:
            asked.found[name] = PARTS[name](asked)
        except CutawayError as error:
            refused[name] = str(error)
        except Exception as error:  # noqa: BLE001 - a part that breaks must not cost the others
            refused[name] = broke(error)
    return refused


def _proved(asked: Asked, ablation: Ablation) -> tuple[dict[str, Result], dict[str, str], Proof | None]:
    """The parts with their proofs, why some have none, and the proof of heads and neurons together."""
    sets: dict[str, list[Unit]] = {}
    for name, part in asked.found.items():
        if isinstance(part, Ranking) and part.proof is None:
            units = [Unit.parse(item) for item in part.items]
            sets[name] = worthwhile(units, part.scores.tolist())[: asked.k]
    alone = sets.get("heads", [])
    proved = prove_together(ablation, sets, WHOLE, alone, asked.draws, asked.seed, NOUNS)
    parts = {
        name: part.replace(
            proof=proved.proofs.get(name, part.proof), notes=tuple(n for n in part.notes if n != UNASKED)
        )
        for name, part in asked.found.items()
    }
    if alone:
        drops = [proved.alone.get(Unit.parse(item), float("nan")) for item in parts["heads"].items]
        parts["heads"] = parts["heads"].replace(columns={**parts["heads"].columns, DROP: drops})
    return parts, proved.unproved, proved.proofs.get(JOINT)


class _Callable(ModuleType):
    """``cutaway.explain`` is the function; once this module is imported it is the module: both can be called."""

    def __call__(self, *args: Any, **given: Any) -> Explanation:
        return explain(*args, **given)


sys.modules[__name__].__class__ = _Callable
