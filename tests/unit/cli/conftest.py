from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.fakes import GLANCE, STARE, install, install_loader


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Two methods and a loader of stub models; the list of what was loaded."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    install(tmp_path, monkeypatch, "fake_methods", {"see/glance.py": GLANCE, "prove/stare.py": STARE})
    return install_loader(monkeypatch)
