"""Every error a user can meet, as one tree.

    CutawayError                 base: one sentence - what was asked, what was found, what to try
    |- InputError                a prompt, image, token or batch that cannot be used
    |  |- TokenError             text that is not the one token it must be
    |  |- ImageError             an image that cannot be read or does not fit
    |  `- MismatchError          two inputs that must line up and do not
    |- SiteError                 a place in the model
    |  |- SiteSyntaxError        the text is not a site
    |  |- SiteMissingError       this model has no such site, or it is refused with a reason
    |  `- SiteRangeError         layer, head, neuron, expert or position out of range
    |- InterventionError         an intervention that returns another shape, dtype or NaN
    |- ModelError                a model
    |  |- LoadError              a folder, name or revision that cannot be loaded
    |  |- WeightsError           weights that are damaged or not finite
    |  `- UnsupportedError       an architecture or option Cutaway does not understand, and says so
    |- MethodError               a method or its parameters
    |  |- UnknownMethodError     no method of that name
    |  `- ParameterError         a parameter that is missing, unknown or of the wrong kind
    `- ResultError               a result that cannot be saved, opened or drawn

The command line prints the sentence and leaves with the class's ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CutawayError(Exception):
    """One sentence: what was asked, what was found, what to try.

    Args:
        asked: what the user wanted, with the value ("site 'L9.attn.z'").
        found: what there is instead, with the value ("the model has layers 0-3").
        hint: what to try; may be empty when nothing helps.
    """

    exit_code = 1

    def __init__(self, asked: str, found: str, hint: str = "") -> None:
        self.asked, self.found, self.hint = asked, found, hint
        parts = (asked + ": " if asked else "", found, f"; {hint}" if hint else "")
        sentence = "".join(parts).rstrip(".")
        super().__init__(sentence if sentence.endswith("?") else sentence + ".")

    def __reduce__(self) -> tuple[type[CutawayError], tuple[str, str, str]]:
        return type(self), (self.asked, self.found, self.hint)


class InputError(CutawayError, ValueError):
    """A prompt, image, token or batch that cannot be used."""

    exit_code = 2


class TokenError(InputError):
    """Text that is not the one token it must be."""


class ImageError(InputError):
    """An image that cannot be read or does not fit the model."""


class MismatchError(InputError):
    """Two inputs that must line up and do not."""


class SiteError(CutawayError, LookupError):
    """A place in the model that cannot be used."""

    exit_code = 2


class SiteSyntaxError(SiteError):
    """Text that is not a site."""


class SiteMissingError(SiteError):
    """This model has no such site, or refuses it with a reason."""


class SiteRangeError(SiteError):
    """Layer, head, neuron, expert or position out of range."""


class InterventionError(CutawayError, ValueError):
    """An intervention that returns another shape, another dtype or NaN."""


class ModelError(CutawayError):
    """A model that cannot be used."""


class LoadError(ModelError):
    """A folder, name or revision that cannot be loaded."""

    exit_code = 2


class WeightsError(ModelError):
    """Weights that are damaged or not finite."""


class UnsupportedError(ModelError):
    """An architecture or option that Cutaway does not understand, and says so."""


class MethodError(CutawayError):
    """A method that cannot be run."""

    exit_code = 2


class UnknownMethodError(MethodError, LookupError):
    """No method of that name."""


class ParameterError(MethodError, ValueError):
    """A parameter that is missing, unknown or of the wrong kind."""


class ResultError(CutawayError):
    """A result that cannot be saved, opened or drawn."""


def broke(error: Exception) -> str:
    """What happened, in one line, where an error that is none of ours must not cost the rest."""
    return f"it broke: {type(error).__name__}: {' '.join(str(error).split())}"


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """'did you mean a, b?' for the choices closest to ``name``; '' when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=n, cutoff=0.5)
    return f"did you mean {', '.join(repr(c) for c in close)}?" if close else ""
