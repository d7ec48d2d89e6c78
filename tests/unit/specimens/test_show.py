"""What the command line prints about specimens."""

from pathlib import Path

from cutaway import specimens
from cutaway.specimens import show


def test_the_list_has_every_specimen_with_size_skills_and_accuracies():
    rows = {row["specimen"]: row for row in show.listing()}
    assert set(rows) == set(specimens.names())
    assert rows["town"]["size"].endswith(" MB")
    assert "facts" in rows["town"]["skills"]
    assert "sum held-out 1.00" in rows["town"]["accuracies"]


def test_a_card_shows_prompts_with_their_answers():
    text = show.described("town")
    for example in specimens.card("town").examples:
        assert f"{example['prompt']} ->{example['answer']}" in text
    assert "fact held-out" in text
    assert "python -m recipes.town" in text


def test_training_through_show_trains(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(show.series, "train", lambda name, **options: seen.append((name, options["checkpoints"])))
    show.train("micro", checkpoints=3, cache=tmp_path)
    assert seen == [("micro", 3)]


def test_the_page_shows_the_list():
    page = (Path(__file__).parents[3] / "docs" / "specimens.md").read_text(encoding="utf-8")
    shown = page.split("<!-- specimens -->\n")[1].split("\n<!-- end of specimens -->")[0]
    assert shown == show.table()
