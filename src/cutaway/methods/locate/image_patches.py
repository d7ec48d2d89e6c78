"""Image patches: what each patch brings to the answer, by four maps that check each other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import annotated_types
import torch
from torch import Tensor

from cutaway.core.errors import ImageError, ParameterError, SiteMissingError, UnsupportedError
from cutaway.core.inputs import Inputs, PatchGrid
from cutaway.core.method import method
from cutaway.core.metric import Metric
from cutaway.core.params import Count, DrawCount, Image, Prompt, Target
from cutaway.core.proof import Check, Proof
from cutaway.engine.occlusion import Occlusion
from cutaway.models.handle import Model
from cutaway.ops.draws import ROOM, UNASKED, different, sizes
from cutaway.ops.hops import Sources, sources
from cutaway.ops.layout import over_pixels
from cutaway.ops.parts import unpadded
from cutaway.ops.watched import rounding
from cutaway.results.imagemap import ImageMap

BEST, ALL, TWO, OCCLUSION = "best head", "all heads", "two-hop", "occlusion"


@method(cites="yu2024llava", example={"prompt": "what is here", "image": "image.png"})
def image_patches(
    model: Model,
    prompt: Prompt,
    image: Image | None = None,
    target: Target | None = None,
    versus: Target | None = None,
    number: Annotated[int, annotated_types.Ge(0)] = 0,
    direct: Literal["first-order", "exact"] = "first-order",
    occlude: Literal["mean", "zero", "none"] = "mean",
    block: Count = 1,
    low: float = 0.2,
    k: Count = 10,
    draws: DrawCount = 5,
    seed: int = 0,
) -> ImageMap:
    """What each image patch brings to the answer, in nats: four maps side by side, none of them rescaled.

    *Best head*: what the head that adds most brings from each patch. *All heads*: the sum over every head. *Two-hop*:
    that, and what text tokens pick up from the patch and hand on. *Occlusion*: the drop in log-probability when the
    patch is emptied. The image share says how much of what positions bring came from the image; a low one is flagged
    as a likely hallucination. The proof empties the top patches of the two-hop map together, against random others.

    Source: Yu and Ananiadou (2024), "Understanding multimodal LLMs: the mechanistic interpretability of LLaVA in visual
    question answering", for the first map.

    Args:
        prompt: text, or inputs that bring their images.
        image: the image that goes with the prompt.
        target: the token whose log-probability is explained; the model's own answer when it is not given.
        versus: a rival token: scores are then those of the logit difference.
        number: of the image that the maps lie over, where the inputs bring several; they are counted from 0.
        direct: how heads that read a patch themselves are scored: by first order, which adds up over heads and
            patches, or by each one's exact increase, which does not.
        occlude: what an emptied patch becomes where it enters the language model: the mean of the image's patches, or
            zero. "none" leaves the map out.
        block: side, in patches, of what occlusion empties at once; its drop is shared out evenly over its patches.
        low: the image share below which the answer is flagged.
        k: how many patches the proof empties together, at most.
        draws: random draws of the proof, at least 5; 0 leaves it out.
        seed: of the draws.

    Returns:
        the maps over the processor's own patch grid, with ``figures`` (shares and totals) and ``agreement()``.

    Raises:
        ImageError: no image, or one whose patches cannot be told. ParameterError: no image of that number.
        UnsupportedError: heads that cannot be told apart, and no occlusion asked for instead.
    """
    inputs = unpadded(model.inputs(prompt, image))
    grids = _grids(model, inputs, number)
    positions = [p for grid in grids for p in grid.positions]
    seen = [p for p, role in enumerate(inputs.roles[0]) if role == "image"]
    unit = "nats" if versus is None else "logits"
    found, notes = _sources(model, inputs, seen, target, versus, direct == "exact", occlude != "none")
    if found is not None:
        token = found.goal.ids[0]
    else:
        token = int(model(inputs)[0, -1].argmax()) if target is None else target
    maps, figures, more = ({}, {}, []) if found is None else _read(found, seen, low, unit)
    metric = Metric("logprob", (token,)) if versus is None else Metric("logit_diff", (token, versus))
    empty = Occlusion(model, inputs, positions, "zero" if occlude == "zero" else "mean", metric)
    if occlude != "none":
        blocks = [some for grid in grids for some in _blocks(grid, block)]
        values, base, how = empty([*blocks, positions])
        maps[OCCLUSION] = torch.zeros(inputs.ids.shape[1])
        for some, drop in zip(blocks, (base - values).tolist(), strict=False):
            maps[OCCLUSION][some] = drop / len(some)
        figures["all patches emptied"] = float(base - values[-1])
        more.append(f"occlusion by {how}; all patches emptied together cost {figures['all patches emptied']:.3g}")
    picture, stacked = inputs.images[number], torch.stack(list(maps.values()))
    laid, boxes = over_pixels(grids, (picture.width, picture.height), stacked)
    proof, why = _proof(empty, maps, positions, metric, k, draws, seed)
    result = ImageMap(
        title=f"patches of the image that bring {_words(model, token, versus)} in {model.name}",
        image=ImageMap.png(picture),
        pixels=(picture.width, picture.height),
        values=laid,
        boxes=boxes,
        labels={"map": tuple(maps)},
        measure="contribution",
        unit=unit,
        figures=figures,
        check=None if found is None else _check(model, found),
        proof=proof,
    )
    notes += [*more, *_outside(stacked, laid, seen, tuple(maps)), *_agreement(result), *why]
    return result.replace(notes=tuple(notes))


def _sources(
    model: Model, inputs: Inputs, seen: list[int], target: int | None, versus: int | None, exact: bool, other: bool
) -> tuple[Sources | None, list[str]]:
    """What positions bring, and what is not in it; None where heads cannot be told apart and there is another map."""
    via = [p for p in range(seen[0], inputs.ids.shape[1]) if p not in set(seen)]  # what is in front has not seen it
    try:
        found = sources(model, inputs, via, target, versus, exact)
    except (UnsupportedError, SiteMissingError) as error:
        if not other:
            raise
        return None, [f"occlusion alone: what heads bring cannot be told: {error.found}"]
    return found, [f"layer {i} is not followed: {why}" for i, why in found.missing.items()]


def _read(
    found: Sources, seen: list[int], low: float, unit: str
) -> tuple[dict[str, Tensor], dict[str, float], list[str]]:
    """The maps [pos] that are read off one forward pass, with shares and notes."""
    own = found.direct if found.exact is None else found.exact
    maps = {BEST: found.from_head, ALL: own, TWO: own + found.carried.sum(0)}
    figures, notes = _shares(found, seen, low, unit)
    return {name: m.float().cpu() for name, m in maps.items()}, figures, [f"best head: {found.head}", *notes]


def _check(model: Model, found: Sources) -> Check:
    return Check(
        name="heads by position sum to what attention adds, and values to what they read",
        value=found.error,
        tolerance=rounding(model.dtype),
        sentence="relative to the largest number of each",
    )


def _grids(model: Model, inputs: Inputs, number: int) -> list[PatchGrid]:
    """The grids of one image."""
    if not inputs.has_images or not inputs.images:
        given = "pixels without the image itself" if inputs.has_images else "the prompt brings no image"
        raise ImageError(f"image patches of {model.name}", given, "give one: image='photo.png'")
    if number >= len(inputs.images):
        n = len(inputs.images)
        found = f"the prompt brings {n} image{'s' * (n > 1)}"
        raise ParameterError(f"parameter 'number' = {number}", found, f"give 0{f' to {n - 1}' * (n > 1)}")
    grids = [grid for grid in inputs.grids if grid.image == number]
    if not grids:
        positions = sum(role == "image" for role in inputs.roles[0])
        kind = getattr(model.hf.config, "model_type", type(model.hf).__name__)
        found = f"which pixels its {positions} image positions stand for is not known for {kind!r}"
        if not positions:
            found = "no position of the prompt stands for a part of it: the model reads images by cross-attention"
        raise ImageError(f"image patches of {model.name}", found, "read sites instead: 'L*.attn.pattern@-1'")
    return grids


def _blocks(grid: PatchGrid, side: int) -> list[list[int]]:
    """The positions of a grid, in squares of ``side`` by ``side`` patches."""
    places = torch.tensor(grid.positions).view(grid.shape)
    return [part.flatten().tolist() for band in places.split(side) for part in band.split(side, dim=1)]


def _words(model: Model, token: int, versus: int | None) -> str:
    rival = "" if versus is None else f" against {model.decode(versus).strip()!r}"
    return f"{model.decode(token).strip()!r}{rival}"


def _shares(found: Sources, seen: list[int], low: float, unit: str) -> tuple[dict[str, float], list[str]]:
    """What came from the image and what from text, by first order over both hops; and what to say about it."""
    image, text = found.brought(seen), found.left(seen)
    both = float(image.abs().sum() + text.abs().sum())
    up, text_up = float(image.clamp_min(0).sum()), float(text.clamp_min(0).sum())
    share = float(image.sum()) / both if both else 0.0
    figures = {
        "image share": share,
        "text share": float(text.sum()) / both if both else 0.0,
        "image": float(image.sum()),
        "text": float(text.sum()),
        "positive image share": up / (up + text_up) if up + text_up else 0.0,
    }
    notes = [
        f"image share {share:.2f}: of {both:.3g} {unit} that positions bring for and against the answer, the image's "
        f"net is {figures['image']:.3g} and the text's {figures['text']:.3g}"
    ]
    if share < low:
        notes.append(
            f"likely hallucination: the image share is below {low:g} (or the answer is one that no patch shows, such "
            "as an absence)"
        )
    return figures, notes


def _outside(scores: Tensor, laid: Tensor, seen: list[int], names: tuple[str, ...]) -> list[str]:
    """What image positions without pixels bring: class tokens, ends of rows, padding, other images."""
    rest = scores[:, seen].double().sum(1) - torch.nan_to_num(laid.double()).flatten(1).sum(1)
    whole = scores[:, seen].double().abs().sum(1)
    said = [
        f"{name} {r:.2g}" for name, r, w in zip(names, rest.tolist(), whole.tolist(), strict=True) if abs(r) > 1e-4 * w
    ]
    return [f"image positions without pixels of this image bring: {', '.join(said)}"] if said else []


def _agreement(result: ImageMap) -> list[str]:
    """How the two-hop map and occlusion agree."""
    table = result.agreement()
    rows: list[dict[str, Any]] = table[(table["map"] == TWO) & (table["other"] == OCCLUSION)].to_dict("records")
    said = []
    for row in rows:
        if row["pearson"] != row["pearson"]:  # NaN: a map of one patch, or of equal ones
            continue
        same = "the same patch is on top" if row["same_top"] else "another patch is on top"
        said.append(f"two-hop against occlusion: r = {row['pearson']:.2f}, rank r = {row['spearman']:.2f}, {same}")
        if not row["same_top"]:
            said.append(
                "where they differ, occlusion is the causal one: what MLPs compute, and where heads look, is not in "
                "the other maps"
            )
    return said


def _proof(
    empty: Occlusion,
    maps: dict[str, Tensor],
    positions: list[int],
    metric: Metric,
    k: int,
    n_draws: int,
    seed: int,
) -> tuple[Proof | None, list[str]]:
    """The drop without the top patches of the two-hop map, against as many others drawn at random."""
    if n_draws == 0:
        return None, [UNASKED]
    name = TWO if TWO in maps else OCCLUSION
    here = maps[name][positions]
    order = [positions[i] for i in here.argsort(descending=True, stable=True).tolist()]
    most = min(k, len(positions) // ROOM, int((here > 0).sum()))
    if most == 0:
        return None, ["no proof: no patch brings anything, or there are too few others to compare with"]
    generator, ks = torch.Generator().manual_seed(seed), sizes(most)
    sets = [order[:n] for n in ks]
    for _ in range(n_draws):
        for n in ks:
            drawn = torch.randperm(len(order) - n, generator=generator)[:n] + n
            sets.append([order[i] for i in drawn.tolist()])
    values, base, _ = empty(sets)
    drop = base - values
    what = "log p(target)" if metric.form == "logprob" else "the logit difference"
    return Proof(
        ablated=f"emptying the top patches of the {name} map",
        ks=tuple(ks),
        effect=drop[: len(ks)].numpy(),
        random=drop[len(ks) :].view(n_draws, len(ks)).numpy(),
        metric=what,
        unit=metric.unit,
        matched="number",
        distinct=different(sets[2 * len(ks) - 1 :: len(ks)]),
    ), []
