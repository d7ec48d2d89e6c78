"""Sites: the text form and the value are one; what is no site says why."""

from __future__ import annotations

import random

import pytest

from cutaway.core.errors import SiteRangeError, SiteSyntaxError
from cutaway.core.names import TRANSFORMER_LENS, from_transformer_lens, transformer_lens
from cutaway.core.site import KINDS, ROLES, Items, Site, parse_sites


@pytest.mark.parametrize(
    "text",
    [
        "embed", "final_norm", "projector", "embed@-1", "L3.resid_post", "L*.attn.z", "L-1.mlp.act[7]",
        "L0-5.resid_post@0-3+7", "L0+2+4-6.attn.pattern[0-3]", "L3.attn.z[5]@-1", "vision/L2.attn.pattern",
        "L1.mlp.out@image", "L1.expert.act[2/7]", "L1.expert.act[0-1/3+5-9]@2", "L2.expert.gate[3]",
        "L0--1.resid_pre", "L-3--1.resid_pre@-2--1", "L1.sae[12+400]", "L7.attn.k[1]@all", "L1.resid_mid@special",
        "final_norm@text",
    ],
)  # fmt: skip
def test_text_and_value_are_one(text: str) -> None:
    assert str(Site.parse(text)) == text
    assert Site.parse(str(Site.parse(text))) == Site.parse(text)


def test_text_and_value_are_one_for_sites_drawn_at_random() -> None:
    draw = random.Random(0)

    def items() -> Items:
        return Items(
            [(a, a + draw.choice([0, 0, 1, 4])) for a in (draw.randint(-9, 30) for _ in range(draw.randint(1, 3)))]
        )

    for _ in range(2000):
        kind = draw.choice(list(KINDS))
        about = KINDS[kind]
        index = items() if about.index_axis and draw.random() < 0.5 else None
        site = Site(
            kind,
            layers=items() if about.layered and draw.random() < 0.7 else None,
            index=index,
            inner=items() if index and kind.startswith("expert.") and draw.random() < 0.5 else None,
            positions=draw.choice([None, items(), *ROLES]),
            scope=draw.choice(["", "vision"]),
        )
        assert Site.parse(str(site)) == site, str(site)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "does not read as a site"),
        ("L3.attn.z[5", "does not read as a site"),
        ("L3 .attn.z", "does not read as a site"),
        ("L3.attn.zz", "there is no kind 'attn.zz'; did you mean 'attn.z'"),
        ("L3.nonsense", "there is no kind 'nonsense'; kinds: embed"),
        ("attn.z", "attn.z is in every layer; name the layer: 'L3.attn.z' or 'L*.attn.z'"),
        ("L3.embed", "embed is in no layer; write 'embed'"),
        ("L3.resid_post[4]", "resid_post has no heads or neurons to choose"),
        ("L3.mlp.act[4/2]", "only experts have neurons inside"),
        ("L3.attn.z@word", "there is no role 'word'; roles: text, image, special, all"),
        ("L3+.attn.z", "'' is not a number or a range"),
        ("L1.attn.z[1--]", "'1--' is not a number or a range"),
        ("L1.attn.z@3+-", "'-' is not a number or a range"),
    ],
)
def test_what_is_no_site_says_why(text: str, found: str) -> None:
    with pytest.raises(SiteSyntaxError) as caught:
        Site.parse(text)
    assert str(caught.value).startswith(f"site {text!r}: ")
    assert found in str(caught.value)


def test_items_resolve_unions_negative_ends_and_ranges_across_zero() -> None:
    assert Items.parse("0-2+5+-1", "x").resolve(9, "layer", "x") == [0, 1, 2, 5, 8]
    assert Items.parse("0--1", "x").resolve(4, "layer", "x") == [0, 1, 2, 3]
    assert Items.parse("-2--1", "x").resolve(4, "layer", "x") == [2, 3]
    assert Items.parse("-1+0", "x").resolve(4, "layer", "x") == [3, 0]
    assert str(Items.of([-1, 0, 1, 2, 5])) == "-1+0-2+5"
    assert Items.of([-2, -1, 0]).resolve(5, "head", "x") == [3, 4, 0]
    assert Items.of(Items.of(3)) == Items([(3, 3)])
    for values in ([3], [0, 1, 2], [4, 2, 3], [-1, 0], [7, 7]):
        assert Items.parse(str(Items.of(values)), "x").resolve(9, "x", "x") == [v % 9 for v in values]


@pytest.mark.parametrize(
    ("text", "size", "named"),
    [("4", 4, "4"), ("-5", 4, "-5"), ("2-7", 4, "2-7"), ("3-1", 4, "3-1"), ("-1-0", 4, "-1-0")],
)
def test_items_out_of_range_name_what_there_is(text: str, size: int, named: str) -> None:
    with pytest.raises(SiteRangeError, match=rf"head {named} is not there: the valid heads are 0-3"):
        Items.parse(text, "x").resolve(size, "head", "site 'x'")


def test_slices_have_no_text_form() -> None:
    with pytest.raises(SiteSyntaxError, match="has no text form"):
        Items.of(slice(0, 3))


def test_sites_expand_over_layers() -> None:
    assert [str(s) for s in Site.parse("L*.attn.z[1]").expand(2)] == ["L0.attn.z[1]", "L1.attn.z[1]"]
    assert [s.layer for s in Site.parse("L-1+0.resid_post").expand(4)] == [3, 0]
    assert Site.parse("embed").expand(4) == [Site.parse("embed")]
    with pytest.raises(SiteRangeError, match="layer 4 is not there: the valid layers are 0-3"):
        Site.parse("L4.attn.z").expand(4)
    for several in ("L*.attn.z", "L0-1.attn.z", "embed"):
        with pytest.raises(SiteSyntaxError, match="does not name exactly one layer"):
            _ = Site.parse(several).layer


def test_a_site_is_moved_without_touching_the_rest() -> None:
    site = Site.parse("L3.attn.z[5]@-1")
    assert str(site.at(layer=4)) == "L4.attn.z[5]@-1"
    assert str(site.at(index=[0, 1, 2])) == "L3.attn.z[0-2]@-1"
    assert str(site.at(positions="image")) == "L3.attn.z[5]@image"
    assert str(site.at(positions=Items.of([1, 2]), index=Items.of(7))) == "L3.attn.z[7]@1-2"
    assert str(site.whole()) == "L3.attn.z"
    assert site.axes == ("batch", "pos", "head", "d_value")


def test_lists_of_sites_are_read_from_any_mixture() -> None:
    sites = parse_sites(["embed, L0.attn.z", Site.parse("L1.mlp.act[3]"), ["final_norm"], ""])
    assert [str(s) for s in sites] == ["embed", "L0.attn.z", "L1.mlp.act[3]", "final_norm"]


@pytest.mark.parametrize("kind", TRANSFORMER_LENS)
def test_transformer_lens_names_are_the_same_sites(kind: str) -> None:
    ours = f"L11.{kind}" if KINDS[kind].layered else kind
    theirs = transformer_lens(kind, 11)
    assert from_transformer_lens(theirs) == ours
    assert Site.parse(theirs) == Site.parse(ours)
    assert ("{layer}" in transformer_lens(kind)) is KINDS[kind].layered


def test_rotated_queries_are_ours_and_unknown_hooks_are_none() -> None:
    assert from_transformer_lens("blocks.2.attn.hook_rot_q") == "L2.attn.q"
    assert from_transformer_lens("blocks.2.attn.hook_nothing") == ""
    assert transformer_lens("expert.gate", 1) == ""
