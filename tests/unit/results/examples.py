"""One small result of every kind, with what could go wrong in it: NaN, infinity, repeated and strange tokens."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from cutaway.results import (
    Check,
    Explanation,
    Graph,
    Grid,
    ImageMap,
    Pattern,
    Proof,
    Provenance,
    Ranking,
    Readout,
    Result,
    Series,
    Table,
)

TOKENS = ("<s>", " Ada", " lives", "\n", " </script><b>", "שלום", " 👩‍🚀", " Ada")
MADE = Provenance(
    method="patch",
    stage="prove",
    params={"clean": "Ada lives in", "metric": "logit_diff: ' Paris', #11"},
    model="planted",
    model_digest="sha256:0123",
    inputs_digest="sha256:4567",
    versions={"cutaway": "0.1.0", "python": "3.11"},
    seed=0,
    device="cpu",
    dtype="float32",
    seconds=1.5,
    created="2026-01-01T00:00:00+00:00",
)
CHECK = Check(name="layer scores sum to the total", value=2e-7, tolerance=1e-5)
PROOF = Proof(
    ablated="zeroing the named neurons",
    ks=(1, 3),
    effect=[0.5, 2.0],
    random=[[0.1, 0.0], [0.0, 0.1], [-0.1, 0.2], [0.1, 0.1], [0.0, -0.1]],
    metric="log p(' Paris')",
    unit="nats",
)


def grid() -> Grid:
    values = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8).copy()
    values[0, 1], values[1, 2], values[2, 3] = np.nan, np.inf, -np.inf
    return Grid(
        title="Patching <i>resid_post</i> & more",
        values=values,
        axes=("layer", "position"),
        labels={"position": TOKENS},
        measure="normalised recovery",
        unit="fraction",
        made_by=MADE,
        check=CHECK,
        notes=("the probability is saturated",),
    )


def panels() -> Grid:
    return Grid(
        title="Three kinds of site",
        values=np.arange(18.0).reshape(3, 2, 3),
        axes=("kind", "layer", "head"),
        labels={"kind": ("attn.out", "mlp.out", "resid_post")},
        scale="sequential",
        unit="nats",
    )


def pattern() -> Pattern:
    weights = np.tril(np.arange(1.0, 65.0).reshape(8, 8)) * np.ones((1, 2, 1, 1))
    return Pattern(
        title="Attention",
        pattern=(weights / weights.sum(-1, keepdims=True)).astype(np.float32),
        labels={"layer": (3,), "head": (0, 5), "query": TOKENS, "key": TOKENS},
        made_by=MADE,
    )


def readout() -> Readout:
    tokens = [[[TOKENS[(i + j + n) % 8] for n in range(2)] for j in range(8)] for i in range(2)]
    log_probs = np.log(np.linspace(0.9, 0.05, 32, dtype=np.float64)).reshape(2, 8, 2)
    return Readout(
        title="Logit lens",
        tokens=tokens,
        ids=np.arange(32).reshape(2, 8, 2),
        log_probs=log_probs,
        labels={"layer": ("embed", "0"), "position": TOKENS},
        target=" Paris",
        target_log_prob=log_probs[..., 1],
        target_rank=np.arange(16).reshape(2, 8),
        made_by=MADE,
    )


def ranking() -> Ranking:
    return Ranking(
        title="Neurons",
        items=("L0.mlp.act[1]", "L1.mlp.act[2]", "L1.mlp.act[9]", "L2.mlp.act[0]"),
        scores=np.array([0.5, 2.0, np.nan, -1.0]),
        columns={"layer": [0, 1, 1, 2], "writes": [" Paris, \n", "<b>", "שלום", "👩‍🚀"]},
        measure="log-probability increase",
        unit="nats",
        made_by=MADE,
        check=CHECK,
        proof=PROOF,
    )


def series() -> Series:
    y = np.array([[0.0, 1.0, 2.0], [0.5, np.nan, 1.5]])
    return Series(
        title="Faithfulness",
        x=[1, 10, 100],
        y=y,
        lo=y - 0.25,
        hi=y + 0.25,
        labels={"line": ("circuit", "random")},
        x_name="edges",
        measure="faithfulness",
        unit="fraction",
        log_x=True,
    )


def table() -> Table:
    return Table(
        title="Methods",
        columns={"method": ["patch", "<b>"], "drop": [1.5, np.nan], "count": [3, 4], "holds": [True, False]},
        units={"drop": "nats"},
    )


def graph() -> Graph:
    return Graph(
        title="Circuit",
        nodes=("embed", "L0.attn.z[1]", "L1.attn.z[0]", "logits"),
        source=[0, 1, 2, 0],
        target=[1, 2, 3, 3],
        weight=[1.0, -0.5, 0.25, 0.1],
        node_columns={"layer_number": [-1, 0, 1, 2]},
        edge_columns={"into": ["q", "v", "logits", "logits"]},
        unit="logits",
    )


def imagemap() -> ImageMap:
    values = np.linspace(-1, 1, 12).reshape(2, 2, 3).copy()
    values[1, 0, 0] = np.nan
    return ImageMap(
        title="What is red?",
        image=png(),
        values=values,
        labels={"map": ("two-hop", "best head")},
        measure="contribution",
        unit="nats",
        made_by=MADE,
    )


def explanation() -> Explanation:
    heads = Ranking(
        title="Heads", items=("L1.attn.z[0]", "L0.attn.z[1]"), scores=[1.5, np.nan], unit="nats", proof=PROOF
    )
    places = Ranking(
        items=("L1.attn.z[0] from 1", "L0.attn.z[1] from 3"),
        scores=[1.5, -0.5],
        columns={"layer": [1, 0], "source token": [TOKENS[1], TOKENS[3]], "source": [1, 3]},
        unit="nats",
    )
    layers = Ranking(items=("L1.attn.out", "L0.mlp.out"), scores=[2.0, -0.25], unit="nats")
    writes = Table(
        columns={
            "component": ["L0.mlp.act[1]"],
            "raises": ["<b> +1, x +0.5"],
            "lowers": ["y -1"],
            "target place": [0],
        }
    )
    parts = {"lens": readout(), "layers": layers, "heads": heads, "head_positions": places}
    return Explanation(
        title="what makes <i>planted</i> say ' Paris'",
        model="planted",
        prompt="".join(TOKENS),
        tokens=TOKENS,
        roles=["special", *["text"] * 5, "image", "text"],
        answers=(" Paris", " <b>", "\n"),
        answer_log_probs=np.log([0.9, 0.05, 0.01]),
        image=np.frombuffer(png(), dtype=np.uint8),
        target=" Paris",
        log_prob=float(np.log(0.9)),
        story=("It says Paris.", "It read <b>."),
        caveats=("The probability is saturated.",),
        parts={**parts, "ffn_neurons": ranking(), "writes": writes},
        refused={"image_patches": "no <b>image</b>"},
        made_by=MADE,
        proof=PROOF,
        notes=("a note",),
    )


def png(width: int = 6, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(buffer, format="PNG")
    return buffer.getvalue()


EXAMPLES: dict[str, Result] = {
    make.__name__: make()
    for make in (grid, panels, pattern, readout, ranking, series, table, graph, imagemap, explanation)
}
