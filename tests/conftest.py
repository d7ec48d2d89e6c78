"""One thread, quiet libraries: what every test runs under."""

from __future__ import annotations

import pytest
import torch

import tests.pretend  # noqa: F401  a device has to be there before the first backward pass of a process


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
