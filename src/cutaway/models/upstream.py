"""What transformers and the hub's client say while they load: log lines, bars and errors, put into our words."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

from cutaway.core.errors import CutawayError, LoadError, WeightsError


def reason(error: BaseException) -> str:
    """The first sentence of an error's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    end = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1]).rstrip(".")


def torchvision_mismatch() -> str:
    """What is wrong with an installed torchvision that was built for another torch; '' when nothing is.

    transformers imports torchvision wherever it is installed, so that one which cannot be imported breaks every model.
    """
    try:
        needs, version = metadata.requires("torchvision") or [], metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return ""
    wanted = next((m[1] for line in needs if (m := re.match(r"torch\s*\(?==\s*([\d.]+)", line))), "")
    here = torch.__version__.partition("+")[0]
    if not wanted or wanted == here:
        return ""
    return f"torchvision {version} is made for torch {wanted}, and torch {here} is installed"


@contextmanager
def explained(asked: str) -> Iterator[None]:
    """Whatever transformers raises, as a LoadError whose cause it is."""
    try:
        yield
    except CutawayError:
        raise
    except Exception as error:
        if wrong := torchvision_mismatch():
            raise LoadError(asked, wrong, "install the torchvision of this torch, or none") from error
        if isinstance(error, pickle.UnpicklingError):
            found = "its pickle file is damaged, or holds more than weights, and was not opened"
            raise WeightsError(asked, found, "save the weights as safetensors") from error
        raise LoadError(asked, f"transformers could not load it ({type(error).__name__}: {reason(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines of transformers and the hub's client below errors; bars only where a person watches."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS as ASKED
    from huggingface_hub.utils import logging as hub
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    before, bars, hub_before = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    hub_bars = ASKED is None and not are_progress_bars_disabled()  # the environment variable has the last word
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        if hub_bars:
            disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        hub.set_verbosity(hub_before)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
