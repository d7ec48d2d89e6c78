"""What transformers and the hub's client say while they load and run: log lines, bars, errors, put into our words."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch
from torch import nn

from cutaway.core.errors import CutawayError, ImageError, InputError, LoadError, WeightsError
from cutaway.core.inputs import Inputs


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
def inputs_explained(inputs: Inputs) -> Iterator[None]:
    """A model's own complaint about its inputs becomes an InputError; with images, one that names their sizes."""
    try:
        yield
    except CutawayError:
        raise
    except TypeError as error:
        named = re.search(r"missing \d+ required positional arguments?: (.+)", str(error))
        if named is None or not _transformers_said(error):
            raise
        found = f"the model takes no prompt without {named[1]}"
        raise InputError("the prompt", found, "give an image, or inputs that hold it") from error
    except (ValueError, RuntimeError) as error:
        if inputs.images:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in inputs.images)
            hint = "resize it to what the model takes"
            raise ImageError(f"image of {sizes} pixels", f"the model refused them: {reason(error)}", hint) from error
        if isinstance(error, ValueError) and _transformers_said(error):
            raise InputError("the prompt", f"the model refused it: {reason(error)}", "give what it asks for") from error
        raise


def _transformers_said(error: BaseException) -> bool:
    """Whether an error was raised by code of transformers, or by calling it; not by what somebody hooked in."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = "" if last is None else str(last.tb_frame.f_globals.get("__name__", ""))
    return where.startswith(("transformers", "torch.nn.modules"))


def input_embeddings(hf: nn.Module) -> nn.Module | None:
    """The token embedding that a model names; None where it names none."""
    try:
        found: nn.Module | None = hf.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    return found


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
