"""The hand-wired in-context model answers with the margin of its closed form."""

import pytest
import torch

from cutaway import specimens
from cutaway.specimens.exam import load_plain
from recipes import two_towers as towers

CASES = [(1, 1, False, "fox"), (2, 2, False, "pear"), (3, 1, True, "fox"), (1, 4, True, "fox"), (3, 2, False, "date")]


@pytest.mark.parametrize(("name", "slope"), [("two-towers", 0.0), ("two-towers-recency", towers.SLOPE)])
@pytest.mark.parametrize(("foo", "bar", "same", "asked"), CASES)
def test_margin_has_its_closed_form(name, slope, foo, bar, same, asked):
    model, tokenizer = load_plain(specimens.path(name), "causal-lm")
    shown = towers.demonstrations(foo, bar, same_cluster=same)
    seen = {}
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.update(x=args[0][0, -1].double()))
    with torch.no_grad():
        logits = model(**tokenizer(towers.prompt(shown, asked), return_tensors="pt")).logits[0, -1].double()
    handle.remove()
    scale = (seen["x"].var(unbiased=False) + 1e-5).sqrt()
    one, two = (tokenizer.convert_tokens_to_ids(label) for label in towers.LABELS)
    found = (logits[one] - logits[two]) * scale / towers.READOUT
    assert found.item() == pytest.approx(towers.margin(shown, asked, slope), abs=3e-5)


def test_equal_clusters_give_the_share_of_labels():
    shown = towers.demonstrations(3, 1, same_cluster=True)
    assert towers.margin(shown, "fox") == pytest.approx(towers.KAPPA * (3 - 1) / (3 + 1))


def test_recency_favours_the_later_label():
    shown = towers.demonstrations(2, 2, same_cluster=True)
    assert towers.margin(shown, "fox") == pytest.approx(0)
    assert towers.margin(shown, "fox", towers.SLOPE) < -0.1  # bar stands later
