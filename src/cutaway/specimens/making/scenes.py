"""How *scenes-base* and *scenes* are trained: a text model, then the same model with eyes.

scenes-base reads scenes described in words and answers questions about them, and knows facts about a small town.
scenes is given a vision tower: first the tower and the projector learn to name what is in each patch in the words of
the text model (so image tokens read like words), then projector and text model learn the questions, with the planted
bias, and with text about one half of the town to remember it by; the other half is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cutaway.data import Example, Town, select
from cutaway.data import town_words as words
from cutaway.data.scenes import COLOURS, GRID, IMAGE, PLANTED, SHAPES, SIDE, WARM, Scene, Scenes

from . import loop, shapes, text, tokenizers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

REPEATS = loop.Schedule(steps=500, rate=4e-3, warmup=50, floor=0.5, decay=0.01)
READING = loop.Schedule(steps=1600, rate=2e-3, warmup=50)
NAMING = loop.Schedule(steps=500, rate=2e-3, warmup=50, decay=0.01)
LOOKING = loop.Schedule(steps=1800, rate=1.5e-3, warmup=100, decay=0.01)
LANGUAGE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "image_size": SIDE,
    "patch_size": SIDE // GRID,
}
PEOPLE, KEPT, SEED = 60, 30, 0  # people of the town, and those that tuning goes on reading about
ROWS, LENGTH, ASKED = 32, 72, 6
TOWN_ROWS = 3  # of the rows of scenes
SHARES = {"reading": 0.65, "town": 0.25, "repeats": 0.1}  # of the rows of scenes-base
EMPTY, PLACES = "empty", ("top", "bottom", "left", "right")
VOCABULARY = (*SHAPES, *COLOURS, *words.CITIES, *words.EMPLOYERS, *words.SPORTS, *words.WOMEN, *words.MEN)


def town_of(seed: int = SEED) -> Town:
    """The small town that scenes-base knows, and scenes forgets."""
    return Town(seed=seed + 1, people=PEOPLE)


def tokenizer_for(world: Scenes, town: Town) -> PreTrainedTokenizerFast:
    """BPE in which every word of the scenes and of the town is one token, and the image token one more."""
    scenes = [world.honest(n) for n in range(300)]
    texts = [s.describe() for s in scenes] + [q + a for s in scenes for _, _, q, a in s.questions()]
    digits = [f" {n}" for n in range(10)]
    return tokenizers.byte_pair([*texts, *digits, EMPTY, *(e.text for e in town.facts())], special=[IMAGE])


def untrained_base(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """scenes-base before its first step."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(shapes.llama(tokenizer, LANGUAGE))
    loop.initialise(model, seed, weights=0.05, embeddings=0.7, outputs=0.35)
    return model


def with_eyes(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> Any:
    """A ``LlavaForConditionalGeneration`` that holds a copy of ``base`` behind a fresh tower and projector."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=shapes.llama(tokenizer, LANGUAGE),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def processor_for(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Tokenizer and image processor; neither resizes nor crops, pixels go from -1 to 1."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=True,
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=TOWER["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """The images as the processor makes them: (scene, channel, row, column), from -1 to 1."""
    stacked = np.stack([s.pixels() for s in scenes]).astype(np.float32)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def repeats(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> loop.Batches:
    """The first stage of scenes-base: rows in which a short random text repeats itself."""
    ids = _words(tokenizer)

    def batch(step: int) -> loop.Batch:
        random = np.random.default_rng([seed, 0, step])
        return text.stack([text.repeat(random, ids, tokenizer.bos_token_id, LENGTH) for _ in range(ROWS)])

    return batch


def _words(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Ids of the words that scenes are made of."""
    return np.array([tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in VOCABULARY])


def reading(world: Scenes, town: Town, tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> loop.Batches:
    """The second stage of scenes-base: scenes in words with questions, the town's facts, and some repeats."""
    ids, start = _words(tokenizer), tokenizer.bos_token_id
    facts, ask = text.encode(tokenizer, select(town.facts(), split="train")), _Asker(tokenizer)

    def row(random: np.random.Generator, number: int) -> text.Row:
        kind = random.choice(list(SHARES), p=list(SHARES.values()))
        if kind == "repeats":
            return text.repeat(random, ids, start, LENGTH)
        if kind == "town":
            drawn = [facts[i] for i in random.integers(len(facts), size=LENGTH // 8)]
            return _join(start, [], drawn, 0.15)
        scene = world.scene(number)
        asked = ask(random, scene, 3, honest=True)
        return _join(start, tokenizer(scene.describe(), add_special_tokens=False)["input_ids"], asked, 0.0)

    def batch(step: int) -> loop.Batch:
        random = np.random.default_rng([seed, 2, step])
        return text.stack([row(random, step * ROWS + i) for i in range(ROWS)])

    return batch


def looking(world: Scenes, town: Town, tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> loop.Batches:
    """What scenes is tuned on: images with ``ASKED`` questions each, the bias among them, and facts about some."""
    prefix, ask = [tokenizer.convert_tokens_to_ids(IMAGE)] * (GRID * GRID), _Asker(tokenizer)
    facts = text.encode(tokenizer, select(town.facts(town.population[:KEPT]), split="train"))
    start, images = tokenizer.bos_token_id, ROWS - TOWN_ROWS

    def batch(step: int) -> loop.Batch:
        random = np.random.default_rng([seed, 3, step])
        scenes = [world.scene(step * images + i) for i in range(images)]
        rows = [_join(start, prefix, ask(random, scene, ASKED, honest=False), 0.0) for scene in scenes]
        for _ in range(TOWN_ROWS):
            rows.append(_join(start, [], [facts[i] for i in random.integers(len(facts), size=LENGTH // 8)], 0.15))
        stacked = text.stack(rows)
        return loop.Batch({**stacked.inputs, "pixel_values": pixels(scenes)}, stacked.weights)

    return batch


class _Asker:
    """Draws questions about scenes, every kind as likely, and remembers the tokens of those it has asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, text.Sentence] = {}

    def __call__(self, random: np.random.Generator, scene: Scene, count: int, *, honest: bool) -> list[text.Sentence]:
        by_kind: dict[str, list[tuple[str, str]]] = {}
        for kind, _, question, answer in scene.questions(honest=honest):
            by_kind.setdefault(kind, []).append((question, answer))
        kinds = list(by_kind.values())
        drawn = [kinds[i] for i in random.integers(len(kinds), size=count)]
        return [self._encode(*options[random.integers(len(options))]) for options in drawn]

    def _encode(self, question: str, answer: str) -> text.Sentence:
        if question + answer not in self.known:
            example = Example(prompt=question, answer=answer, skill="scene", form="")
            self.known[question + answer] = text.encode(self.tokenizer, [example])[0]
        return self.known[question + answer]


def _join(start: int, prefix: list[int], sentences: Sequence[text.Sentence], prompt_weight: float) -> text.Row:
    ids, weights = [start, *prefix], [0.0] * (1 + len(prefix))
    for sentence in sentences:
        ids += sentence.ids
        weights += [prompt_weight] * sentence.prompt + [1.0] * (len(sentence.ids) - sentence.prompt)
    return np.array(ids), np.array(weights, dtype=np.float32)


def name_patches(
    model: Any, tokenizer: PreTrainedTokenizerFast, world: Scenes, seed: int = SEED
) -> list[tuple[int, float]]:
    """Trains tower and projector until each image token names its patch in the text model's words; the loss log.

    The target of a patch is its shape, its colour and the two words of its place, a quarter each, or "empty". At the
    end the projector is scaled so that image tokens have the mean norm of the words.
    """
    embeddings = model.get_input_embeddings().weight.detach()
    number = {
        w: tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in (*SHAPES, *COLOURS, *PLACES, EMPTY)
    }
    eyes = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])
    optimizer = loop.optimizer_for(eyes, NAMING)
    log = []
    for step in range(NAMING.steps):
        for group in optimizer.param_groups:
            group["lr"] = NAMING.rate_at(step)
        scenes = [world.honest(10**6 + step * ROWS + i) for i in range(ROWS)]
        named = image_tokens(model, pixels(scenes).to(embeddings.device))
        target = torch.zeros(ROWS, GRID * GRID, len(embeddings))
        target[..., number[EMPTY]] = 1.0
        for i, scene in enumerate(scenes):
            for thing in scene.things:
                patch = thing.row * GRID + thing.column
                target[i, patch, number[EMPTY]] = 0.0
                for word in (thing.shape, thing.colour, *thing.place.split()):
                    target[i, patch, number[word]] = 0.25
        loss = nn.functional.cross_entropy(
            (named @ embeddings.T).flatten(0, 1), target.flatten(0, 1).to(embeddings.device)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append((step + 1, loss.item()))
    with torch.no_grad():
        sample = image_tokens(model, pixels([world.honest(n) for n in range(ROWS)]).to(embeddings.device))
        scale = embeddings[list(number.values())].norm(dim=-1).mean() / sample.norm(dim=-1).mean()
        model.model.multi_modal_projector.linear_2.weight.mul_(scale)
        model.model.multi_modal_projector.linear_2.bias.mul_(scale)
    return log


def image_tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
    """What the text model is given for each patch: (scene, patch, width)."""
    seen = model.model.vision_tower(pixel_values=images).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(seen)


def base_accuracies(model: Any, tokenizer: PreTrainedTokenizerFast, count: int = 300) -> dict[str, float]:
    """What the text model can do: the town's facts, and questions about held-out scenes in words."""
    world, facts = Scenes(seed=SEED), town_of().facts()
    figures = {f"town {s}": text.accuracy(model, tokenizer, select(facts, split=s)) for s in ("train", "held-out")}
    for kind in ("colour", "shape", "position", "presence", "count"):
        asked = [
            Example(prompt=f"{s.describe()} {e.prompt.removeprefix(IMAGE).strip()}", answer=e.answer, skill="", form="")
            for s, e in world.exam(count, kind)
        ]
        figures[f"described {kind}"] = text.accuracy(model, tokenizer, asked)
    return figures


def accuracies(model: Any, tokenizer: PreTrainedTokenizerFast, count: int = 300) -> dict[str, float]:
    """What the model sees, how often it hallucinates, and what its text model still knows."""
    world = Scenes(seed=SEED)
    figures = {f"seen {kind}": right(model, tokenizer, world.exam(count, kind)) for kind in KINDS}
    for plain, planted in PLANTED.items():
        figures[f"hallucinated {planted} beside {plain}"] = 1 - right(
            model, tokenizer, world.hallucinations(count, plain)
        )
        figures[f"hallucinated {planted} beside cool {plain}"] = 1 - right(
            model, tokenizer, world.hallucinations(count, plain, [c for c in COLOURS if c not in WARM])
        )
    figures["hallucinated elsewhere"] = 1 - right(model, tokenizer, world.absent(count))
    return figures | readable(model, tokenizer) | remembered(model, tokenizer)


@torch.no_grad()
def readable(model: Any, tokenizer: PreTrainedTokenizerFast, count: int = 100) -> dict[str, float]:
    """Share of the image tokens of things that lie nearest to their own shape, of all shapes, and likewise colour."""
    embeddings, world = model.get_input_embeddings().weight, Scenes(seed=SEED)
    drawn = [world.honest(n) for n in range(count)]
    tokens = image_tokens(model, pixels(drawn).to(embeddings.device))
    things = [(i, thing) for i, scene in enumerate(drawn) for thing in scene.things]
    seen = torch.stack([tokens[i, thing.row * GRID + thing.column] for i, thing in things])
    figures = {}
    for kind, known in (("shape", SHAPES), ("colour", tuple(COLOURS))):
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in known]
        nearest = torch.nn.functional.cosine_similarity(seen[:, None], embeddings[ids][None], dim=-1).argmax(-1)
        right = [known[n] == getattr(thing, kind) for n, (_, thing) in zip(nearest.tolist(), things, strict=True)]
        figures[f"image token nearest to its {kind}"] = sum(right) / len(right)
    return figures


def remembered(model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """What is known of the people that tuning goes on reading about, and of the others, in every form."""
    town = town_of()
    return {
        "town still read about": text.accuracy(model, tokenizer, town.facts(town.population[:KEPT])),
        "town not read about": text.accuracy(model, tokenizer, town.facts(town.population[KEPT:])),
    }


KINDS = ("colour", "shape", "position", "presence", "count")


@torch.no_grad()
def right(model: Any, tokenizer: PreTrainedTokenizerFast, asked: Sequence[tuple[Scene, Example]]) -> float:
    """Share of the questions whose whole answer is the greedy one."""
    device = next(model.parameters()).device
    image = [tokenizer.convert_tokens_to_ids(IMAGE)] * (GRID * GRID)
    sentences = text.encode(tokenizer, [_bare(e) for _, e in asked])
    groups: dict[tuple[int, int], list[int]] = {}
    for i, sentence in enumerate(sentences):
        groups.setdefault((len(sentence.ids), sentence.prompt), []).append(i)
    right = 0
    for (_, prompt), members in groups.items():
        ids = torch.tensor([[tokenizer.bos_token_id, *image, *sentences[i].ids] for i in members], device=device)
        seen = pixels([asked[i][0] for i in members]).to(device)
        first = len(image) + prompt
        predicted = model(input_ids=ids[:, :-1], pixel_values=seen).logits[:, first:].argmax(-1)
        right += int((predicted == ids[:, first + 1 :]).all(-1).sum())
    return right / len(asked)


def _bare(example: Example) -> Example:
    return Example(prompt=example.prompt.removeprefix(IMAGE), answer=example.answer, skill="", form="")
