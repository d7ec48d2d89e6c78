from __future__ import annotations

import sys

import pytest

from cutaway.core.progress import track


@pytest.mark.parametrize("watched", [True, False])
def test_items_pass_and_a_bar_is_drawn_only_where_a_person_watches(
    watched: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    assert list(track(iter([1, 2, 3]), "layers", total=3)) == [1, 2, 3]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("layers" in captured.err) is watched
