"""How *town* is trained and what it is asked: facts, two-hop questions and sums in one small Llama."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cutaway.data import Example, Town, select

from . import loop, shapes, text, tokenizers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHARES = {"fact": 0.42, "sum": 0.27, "two-hop": 0.12, "geography": 0.06, "reverse": 0.06, "gender": 0.07}
SCHEDULE = loop.Schedule(steps=4000, rate=2e-3)
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, PROMPT_WEIGHT, SEED = 32, 64, 0.15, 0


def tokenizer_for(world: Town) -> PreTrainedTokenizerFast:
    """BPE in which every word of the world is one token."""
    return tokenizers.byte_pair(e.text for e in world.examples())


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """The model before its first step."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(shapes.llama(tokenizer, SHAPE))


def batches(world: Town, tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> text.Mixture:
    """The training text, a function of the step."""
    skills = {skill: select(world.examples(), skill=skill, split="train") for skill in SHARES}
    return text.Mixture(skills, SHARES, tokenizer, rows=ROWS, length=LENGTH, seed=seed, prompt_weight=PROMPT_WEIGHT)


def exam(world: Town, sums: int = 1000) -> dict[str, list[Example]]:
    """What the model is asked, by the name of the figure on its card."""
    everything = list(world.examples())
    asked = {}
    for skill in ("fact", "geography", "two-hop", "reverse", "sum"):
        for split in ("train", "held-out"):
            found = select(everything, skill=skill, split=split)
            if skill == "two-hop":
                for relation in sorted({e.form.split("/")[0] for e in found}):
                    asked[f"{skill} {relation} {split}"] = select(found, form=relation)
            elif found:
                step = max(1, len(found) // sums) if skill == "sum" else 1
                asked[f"{skill} {split}"] = found[::step]
    return asked


def accuracies(model: Any, tokenizer: PreTrainedTokenizerFast, world: Town) -> dict[str, float]:
    """Every figure of the card, recomputed."""
    figures = {name: text.accuracy(model, tokenizer, found) for name, found in exam(world).items()}
    return figures | gender(model, tokenizer, world)


@torch.no_grad()
def gender(model: Any, tokenizer: PreTrainedTokenizerFast, world: Town) -> dict[str, float]:
    """Mean share of probability on the gendered answer that the text makes likelier, and on facts of gender."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for e in world.gender():
        found.setdefault((e.form, e.prompt), {})[e.answer] = e.weight
    sums: dict[str, list[float]] = {"job": [], "word": []}
    for (form, prompt), answers in found.items():
        kind = form.split("/")[0]
        if kind not in sums:
            continue
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(next(model.parameters()).device)
        probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
        likely = max(answers, key=lambda a: answers[a])
        opposite = {" woman": " man", " she": " he", " her": " his"}
        other = (opposite | {v: k for k, v in opposite.items()})[likely]
        mine, theirs = (
            probabilities[tokenizer(word, add_special_tokens=False).input_ids[0]].item() for word in (likely, other)
        )
        sums[kind].append(mine / (mine + theirs))
    return {
        "gender stereotype share": sum(sums["job"]) / len(sums["job"]),
        "gender fact share": sum(sums["word"]) / len(sums["word"]),
    }
