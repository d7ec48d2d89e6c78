"""``make demo`` leaves two reports that open, and can be made again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cutaway
from cutaway import demo


def test_two_reports_are_left_and_their_paths_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    for name, target in (("fact", " Easton"), ("image", " blue")):
        report = tmp_path / "demo" / name / "report.html"
        assert str(report) in printed
        assert "vegaEmbed" in report.read_text(encoding="utf-8")
        assert cutaway.open(report.parent).target == target
    front = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    for link in re.findall(r'href="([^"]+)"', front):
        assert (tmp_path / "demo" / link).is_file()
    assert cutaway.rerun(tmp_path / "demo" / "image").equal
    assert demo.main([str(tmp_path / "demo")]) == 0  # a second time over the first
