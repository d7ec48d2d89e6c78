"""A small run of benchmarks/repro/image_patches.py: maps find the patch that is asked about, and shares tell lies."""

from __future__ import annotations

from functools import cache

import torch

from benchmarks.repro import image_patches as protocol
from cutaway.data import Scenes
from cutaway.models.handle import Model
from cutaway.models.load import load

COUNT = 12


@cache
def model() -> Model:
    return load("scenes")


@torch.no_grad()
def test_what_is_read_directly_is_found() -> None:
    asked = protocol.cases(Scenes(seed=0), COUNT)
    found = [protocol.pointing(model(), asked[kind]) for kind in ("colour", "shape", "presence", "position")]
    assert all(each["read through a text token"] < 0.5 for each in found)
    assert sum(each["maps"]["two-hop"]["pointing"] for each in found) / len(found) >= 0.95
    assert all(each["maps"]["two-hop"]["r with occlusion"] > 0.6 for each in found)


@torch.no_grad()
def test_what_a_text_token_hands_on_is_found_by_two_hops() -> None:
    found = protocol.pointing(model(), protocol.cases(Scenes(seed=0), COUNT)["position, second word"])
    assert found["read through a text token"] > 0.7
    assert found["maps"]["two-hop"]["pointing"] >= 0.9
    assert found["maps"]["best head"]["pointing"] < 0.6
    assert found["maps"]["two-hop"]["r with occlusion"] > found["maps"]["all heads"]["r with occlusion"] + 0.5


@torch.no_grad()
def test_what_a_text_token_computes_is_found_by_occlusion_alone_and_comes_from_its_mlps() -> None:
    found = protocol.pointing(model(), protocol.cases(Scenes(seed=0), COUNT)["count of one"])
    assert found["maps"]["occlusion"]["pointing"] == 1
    assert found["maps"]["two-hop"]["pointing"] < 0.5
    cost = found["cost of the answer's patch"]
    assert cost["MLPs at text tokens held"] < 0.1 * cost["nothing held"] < cost["attention weights held"]


@torch.no_grad()
def test_the_image_share_tells_planted_hallucinations_from_true_answers() -> None:
    found = protocol.hallucinations(model(), Scenes(seed=0), pairs=16)
    share = found["AUROC"]["net image / all, two-hop (image share)"]
    assert share["all true yes"] >= 0.85
    assert share["all true"] >= 0.85
    assert found["AUROC"]["top patch in nats, occlusion"]["all true"] < 0.6
    flagged = found[f"share below {protocol.FLAG}"]
    assert flagged["hallucinated"] > 0.8
    assert max(flagged["true: colour"], flagged["true: shape"], flagged["true: drawn in an honest scene"]) < 0.2
