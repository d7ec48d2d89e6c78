"""Rankings that a method starts from: what they name, and whether they were made on the prompt at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cutaway.core.errors import CutawayError, InputError
from cutaway.core.forms.data import PromptForm
from cutaway.core.inputs import Inputs
from cutaway.core.result import Result
from cutaway.ops.units import EMBED, Unit
from cutaway.ops.watched import WatchedModel

LONGEST = 80  # of a prompt that is quoted


def other_prompt(model: WatchedModel, prompt: Any, batch: Inputs, made: Result | None) -> list[str]:
    """A note where ``made`` was made on another prompt than ``prompt``, whose inputs are ``batch``; else none.

    Prompts are compared as they were written, then by their tokens without those of images. A result that does not
    say what it was made on gets no note.
    """
    written = made.made_by.params.get("prompt") if made is not None and made.made_by is not None else None
    form = PromptForm()
    if written is None or written == form.text(form.accept(prompt)):
        return []
    try:
        parsed = form.parse(written)
        other = model.inputs(list(parsed) if isinstance(parsed, tuple) else parsed)
    except CutawayError:  # another model's prompt, or one that was given as inputs
        return [_note(written)]
    return [] if _words(other) == _words(batch) else [_note(written)]


def components(model: WatchedModel, items: Iterable[str], inputs: Inputs) -> tuple[list[Unit], list[str]]:
    """What items of a ranking name, in their order, and a note where the embedding, which is no component, is left out.

    Raises:
        SiteError: an item that is no component, or is not there in this model. InputError: a source behind the prompt.
    """
    texts = [str(item) for item in items]
    left_out = [f"{EMBED!r} is left out: the embedding is no component"] if EMBED in texts else []
    units = [Unit.parse(text) for text in texts if text != EMBED]
    for unit in units:
        model.expand(unit.whole, inputs)
        if unit.source >= inputs.ids.shape[1]:
            raise InputError(f"component '{unit}'", f"the prompt has {inputs.ids.shape[1]} positions")
    return units, left_out


def _note(written: str) -> str:
    text = written if len(written) <= LONGEST else written[: LONGEST - 1] + "…"
    return f"the ranking was made on another prompt: {text!r}"


def _words(inputs: Inputs) -> list[int]:
    """Ids of the first prompt, without padding and images."""
    places = zip(inputs.ids[0].tolist(), inputs.roles[0], inputs.mask[0].tolist(), strict=True)
    return [token for token, role, real in places if real and role != "image"]
