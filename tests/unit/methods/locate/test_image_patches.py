"""Maps of scenes whose answer patch is known, their definition spelled out, and every family's own patch grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutaway.core.errors import ImageError, ParameterError, UnsupportedError
from cutaway.core.intervention import Set
from cutaway.core.result_file import open_result
from cutaway.data import Scenes
from cutaway.data.scenes import GRID, Scene
from cutaway.methods.locate.image_patches import image_patches
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.results import ImageMap
from tests.unit.models.vlm_folders import FAMILIES, save

WORLD = Scenes(seed=0)
HYBRID = ("qwen3_5", "qwen3_5_moe")  # linear attention in some layers: no heads that write from one position
MAPS = ("best head", "all heads", "two-hop", "occlusion")


@pytest.fixture(scope="module")
def scenes() -> Model:
    return load("scenes")


def asked(kind: str, count: int) -> list[tuple[Scene, str, tuple[int, int]]]:
    """Scenes with a question, and the row and column of what it asks about."""
    found = []
    for scene, example in WORLD.exam(count, kind):
        by_colour = kind == "shape"
        thing = next(t for t in scene.things if (t.colour if by_colour else t.shape) == example.subject)
        found.append((scene, example.prompt, (thing.row, thing.column)))
    return found


def mapped(model: Model, scene: Scene, prompt: str, **given: Any) -> ImageMap:
    return image_patches(model, prompt, image=scene.image(), **{"draws": 0, **given})


def top(result: ImageMap, name: str) -> tuple[int, ...]:
    values = result.values[result.labels["map"].index(name)]
    return tuple(int(i) for i in np.unravel_index(values.argmax(), values.shape))


@pytest.mark.parametrize("kind", ["colour", "shape", "position"])
def test_the_patch_that_is_asked_about_is_on_top_where_it_is_read_directly(scenes: Model, kind: str) -> None:
    for scene, prompt, place in asked(kind, 4):
        found = mapped(scenes, scene, prompt)
        assert top(found, "two-hop") == top(found, "occlusion") == place
        assert found.check is not None
        assert found.check.holds


def test_what_a_text_token_hands_on_is_seen_by_two_hops_and_by_occlusion_alone(scenes: Model) -> None:
    """The second word of a place is read from the question's last token, which had looked at the image before."""
    tops = []
    for scene, prompt, place in asked("position", 8):
        thing = next(t for t in scene.things if (t.row, t.column) == place)
        found = mapped(scenes, scene, f"{prompt} {thing.place.split()[0]}")
        tops.append([top(found, name) == place for name in MAPS])
    best, every, two, occlusion = np.mean(tops, axis=0)
    assert two == occlusion == 1
    assert max(best, every) < 0.5


@torch.no_grad()
def test_maps_are_their_definitions_spelled_out(scenes: Model) -> None:
    """Both hops through the weights of a Llama, the norms in double precision; occlusion by plain runs."""
    scene, prompt, _ = asked("position", 1)[0]
    inputs = scenes.inputs(prompt, image=scene.image())
    seen = list(inputs.grids[0].positions)
    text = [p for p in range(inputs.ids.shape[1]) if p not in seen]
    trace = scenes.trace(inputs, want="L*.resid_pre, L*.attn.pattern, L3.resid_post")
    inner = scenes.hf.model.language_model
    assert trace.logits is not None
    token = int(trace.logits[0, -1].argmax())
    final, gain = trace["L3.resid_post"][0, -1].double(), inner.norm.weight.double()
    scale = (final.square().mean() + 1e-6).sqrt()
    head = scenes.hf.lm_head.weight.double()
    direct, carried = torch.zeros(len(text) + len(seen)).double(), torch.zeros(len(seen)).double()
    written: list[torch.Tensor] = []  # [via, source, d] per layer
    for i, layer in enumerate(inner.layers):
        x, pattern = trace[f"L{i}.resid_pre"][0].double(), trace[f"L{i}.attn.pattern"][0].double()
        size = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        attention, before = layer.self_attn, layer.input_layernorm.weight.double()
        p = ((x[-1] / scale * gain) @ head.T).softmax(-1)
        slope = (head[token] - p @ head) * gain / scale
        for h in range(4):
            rows = slice(32 * h, 32 * h + 32)
            value, out = attention.v_proj.weight.double()[rows], attention.o_proj.weight.double()[:, rows]
            moved = (x / size * before) @ value.T @ out.T
            direct += pattern[h, -1] * (moved @ slope)
            for earlier in written:
                read = (earlier / size[text][:, None] * before) @ value.T @ out.T @ slope
                carried += pattern[h, -1, text] @ read
        vectors = torch.zeros(len(text), len(seen), 128).double()
        for h in range(4):
            rows = slice(32 * h, 32 * h + 32)
            value, out = attention.v_proj.weight.double()[rows], attention.o_proj.weight.double()[:, rows]
            vectors += pattern[h][text][:, seen, None] * ((x / size * before) @ value.T @ out.T)[seen]
        written.append(vectors)
    found = mapped(scenes, scene, prompt).values
    assert found[1].ravel() == pytest.approx(direct[seen].numpy(), abs=1e-4)
    assert found[2].ravel() == pytest.approx((direct[seen] + carried).numpy(), abs=1e-4)
    mean = trace["L0.resid_pre"][0, seen].mean(0)
    plain = trace.logits[0, -1].log_softmax(-1)[token]
    for n in (0, 7, 13):
        without = scenes.trace(inputs, do=Set(f"L0.resid_pre@{seen[n]}", mean)).logits
        assert without is not None
        drop = float(plain - without[0, -1].log_softmax(-1)[token])
        assert found[3].ravel()[n] == pytest.approx(drop, abs=1e-4)


def test_planted_hallucinations_have_a_smaller_image_share_and_are_flagged(scenes: Model) -> None:
    warm = [(scene, e.prompt) for scene, e in WORLD.hallucinations(12, "triangle", ("red",))]
    honest = [WORLD.honest(n) for n in range(30)]
    true = [(scene, warm[0][1]) for scene in honest if scene.find("star")]
    yes = scenes.token(" yes")
    shares: list[list[float]] = []
    flags: list[list[bool]] = []
    for group in (warm, true):
        found = [mapped(scenes, scene, prompt, occlude="none") for scene, prompt in group]
        answered = [r for r in found if f"bring '{scenes.decode(yes).strip()}'" in r.title]
        assert len(answered) >= 5
        shares.append([r.figures["image share"] for r in answered])
        flags.append([any("likely hallucination" in note for note in r.notes) for r in answered])
    assert np.median(shares[0]) < np.median(shares[1]) - 0.05
    assert np.mean(flags[0]) > 0.7
    assert np.mean(flags[1]) < 0.3


def test_the_proof_empties_patches_and_holds(scenes: Model) -> None:
    scene, prompt, _ = asked("colour", 1)[0]
    proof = mapped(scenes, scene, prompt, draws=5).proof
    assert proof is not None
    assert proof.holds, str(proof)
    assert proof.n_draws == 5
    assert proof.ks[-1] <= GRID * GRID // 3


def test_a_map_of_what_speaks_against_an_answer_is_negative(scenes: Model) -> None:
    """No rescaling: the patch that makes it say blue speaks against green, by as many logits."""
    scene, prompt, place = asked("colour", 1)[0]
    thing = next(t for t in scene.things if (t.row, t.column) == place)
    other = " green" if thing.colour != "green" else " blue"
    rival = mapped(scenes, scene, prompt, target=other, versus=f" {thing.colour}")
    assert rival.unit == "logits"
    assert rival.values[2][place] == rival.values[2].min() < -1
    swapped = mapped(scenes, scene, prompt, target=f" {thing.colour}", versus=other)
    assert swapped.values[2] == pytest.approx(-rival.values[2], abs=1e-4)


def test_blocks_are_emptied_at_once_and_share_their_drop(scenes: Model) -> None:
    scene, prompt, (row, column) = asked("colour", 1)[0]
    single, double = (mapped(scenes, scene, prompt, block=n).values[3] for n in (1, 2))
    squares = double.reshape(2, 2, 2, 2)
    assert squares == pytest.approx(np.broadcast_to(squares[:, :1, :, :1], squares.shape))
    assert double.sum() == pytest.approx(single.sum(), rel=0.2)  # one patch has nearly all of it
    assert double[row, column] == double.max()
    whole = mapped(scenes, scene, prompt, block=4)
    assert whole.values[3].sum() == pytest.approx(whole.figures["all patches emptied"], abs=1e-5)


def test_exact_increases_never_exceed_their_first_order(scenes: Model) -> None:
    scene, prompt, _ = asked("position", 1)[0]
    exact, first = (mapped(scenes, scene, prompt, direct=d, occlude="none") for d in ("exact", "first-order"))
    assert (exact.values[1] <= first.values[1] + 1e-5).all()
    assert exact.values[0] == pytest.approx(first.values[0])
    assert exact.labels["map"] == MAPS[:3]


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("size", [(64, 64), (90, 40)])
def test_every_family_has_maps_over_its_own_grid(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    model = load(tmp_path / "model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    found = image_patches(model, "what is here", image=image)
    assert found.check is not None
    assert found.check.holds, str(found.check)
    assert found.labels["map"] == MAPS
    assert found.size == size
    assert np.isfinite(found.values).mean() > 0.5
    assert any("softmax over keys" in note for note in found.notes) is (name in HYBRID)
    inputs = model.inputs("what is here", image)
    known = {p for grid in inputs.grids for p in grid.positions}
    classes = [p for p, role in enumerate(inputs.roles[0]) if role == "image" and p not in known]
    if not classes:  # else what they bring is in no patch
        assert np.nansum(found.values[2]) == pytest.approx(found.figures["image"], abs=1e-4)
    assert open_result(found.save(tmp_path / "result")) == found


def test_occlusion_stays_where_heads_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def untold(*asked: object) -> None:
        raise UnsupportedError("what heads bring", "they are not told apart", "")

    monkeypatch.setattr("cutaway.methods.locate.image_patches.sources", untold)
    save("llava", tmp_path)
    model, image = load(tmp_path), Image.new("RGB", (64, 64), "red")
    found = image_patches(model, "what is here", image=image)
    assert found.labels["map"] == ("occlusion",)
    assert found.notes[0].startswith("occlusion alone: what heads bring cannot be told")
    assert found.proof is not None
    assert "of the occlusion map" in found.proof.sentence
    with pytest.raises(UnsupportedError, match="they are not told apart"):
        image_patches(model, "what is here", image=image, occlude="none")


def test_one_of_several_images_is_named(tmp_path: Path) -> None:
    save("llava", tmp_path)
    model = load(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in noise]
    both = model.inputs("<image> and <image> what is here", images)
    first, second = (image_patches(model, both, number=n, draws=0) for n in (0, 1))
    assert first.figures["image share"] == second.figures["image share"]
    assert np.nansum(first.values[2]) + np.nansum(second.values[2]) == pytest.approx(first.figures["image"], abs=1e-4)
    assert not np.allclose(first.values, second.values)
    assert any("without pixels of this image" in note for note in first.notes)
    with pytest.raises(ParameterError, match=r"'number' = 2: the prompt brings 2 images; give 0 to 1"):
        image_patches(model, both, number=2)


def test_an_image_at_the_end_is_read_by_itself(tmp_path: Path) -> None:
    save("llava", tmp_path)
    found = image_patches(load(tmp_path), "what is here <image>", image=Image.effect_noise((32, 32), 80), draws=0)
    assert found.values[2] == pytest.approx(found.values[1])
    assert found.check is not None
    assert found.check.holds


def test_what_cannot_be_mapped_is_said_in_one_sentence(scenes: Model) -> None:
    scene, prompt, _ = asked("colour", 1)[0]
    with pytest.raises(ImageError, match="the prompt brings no image; give one"):
        image_patches(scenes, "Is there a star?")
    with pytest.raises(ImageError, match="30x30 pixels: the model refused them"):
        image_patches(scenes, prompt, image=scene.image().resize((30, 30)))
    with pytest.raises(ImageError, match="loaded without an image processor"):
        image_patches(load("planted-llama"), "Ada plays", image=scene.image())
    with pytest.raises(ImageError, match="the prompt brings no image"):
        image_patches(load("planted-llama"), "Ada plays")
