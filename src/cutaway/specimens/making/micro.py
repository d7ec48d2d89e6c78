"""How *micro* is trained: facts alone, in a model so small that a whole series fits into a minute of one core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cutaway.data import Town, select

from . import loop, shapes, text, tokenizers

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SCHEDULE = loop.Schedule(steps=450, rate=4e-3, warmup=30)
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
PEOPLE, ROWS, LENGTH, PROMPT_WEIGHT, SEED = 80, 24, 48, 0.05, 0


def world_of() -> Town:
    """The town of the series."""
    return Town(seed=0, people=PEOPLE)


def tokenizer_for(world: Town) -> PreTrainedTokenizerFast:
    """BPE in which every word of the facts is one token."""
    return tokenizers.byte_pair(e.text for e in world.facts())


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """The model before its first step."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(shapes.llama(tokenizer, SHAPE))
    loop.initialise(model, seed, weights=0.07, embeddings=0.7, outputs=0.4)
    return model


def batches(world: Town, tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> text.Mixture:
    """The training text, a function of the step."""
    skills = {"fact": select(world.facts(), split="train")}
    return text.Mixture(
        skills, {"fact": 1.0}, tokenizer, rows=ROWS, length=LENGTH, seed=seed, prompt_weight=PROMPT_WEIGHT
    )


def accuracies(model: Any, tokenizer: PreTrainedTokenizerFast, world: Town) -> dict[str, float]:
    """Facts as trained, and in the sentence forms that were held out."""
    facts = world.facts()
    return {f"fact {s}": text.accuracy(model, tokenizer, select(facts, split=s)) for s in ("train", "held-out")}
