"""Texts of random tokens, by their ids alone: said twice, or labelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cutaway.core.errors import ParameterError
from cutaway.core.inputs import Inputs
from cutaway.ops.watched import WatchedModel

SHOTS = 8  # labelled words before the one asked, where the model has room


def plain_ids(model: WatchedModel) -> list[int]:
    """Ids of the vocabulary that stand for text: none that the configuration or the tokenizer gives another role."""
    encoder = model.encoder
    special = set(_named_ids(encoder.config)) | set(_named_ids(encoder.text_config))
    special |= encoder.special_ids | encoder.image_ids
    scored = (
        getattr(encoder.text_config, "vocab_size", None) or encoder.vocabulary_size
    )  # some embed more than they say
    found = [i for i in range(min(encoder.vocabulary_size, scored)) if i not in special]
    if len(found) < 4:
        asked = "random tokens"
        raise ParameterError(asked, f"the vocabulary has {len(found)} that are not special", "give prompts")
    return found


def _named_ids(config: Any) -> Iterator[int]:
    """Every id that a configuration names (``bos_token_id``, ``image_token_index``, ...)."""
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            for each in value if isinstance(value, list | tuple) else [value]:
                if isinstance(each, int):
                    yield each


def _start(model: WatchedModel) -> list[int]:
    """The token that texts begin with, where the configuration names one."""
    encoder = model.encoder
    bos = getattr(encoder.text_config, "bos_token_id", None)
    return [bos] if isinstance(bos, int) and 0 <= bos < encoder.vocabulary_size else []


def _room(model: WatchedModel) -> int:
    encoder = model.encoder
    limit = getattr(encoder.text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def repeated_tokens(
    model: WatchedModel, allowed: Sequence[int], count: int, length: int, generator: torch.Generator
) -> Inputs:
    """``count`` texts of ``length`` different random tokens and the same again, shorter where there is no room."""
    start = _start(model)
    n = min(length, (_room(model) - len(start)) // 2, len(allowed))
    rows = [draw(allowed, n, generator).repeat(2) for _ in range(count)]
    return model.inputs(torch.cat([torch.tensor([start] * count, dtype=torch.long), torch.stack(rows)], 1))


def labelled_tokens(
    model: WatchedModel, allowed: Sequence[int], count: int, generator: torch.Generator
) -> tuple[Inputs, Tensor | None]:
    """Texts of random words behind each of which stands one of two labels, then a word that was shown.

    Each of ``count`` draws is asked twice, for a word of either label, so that a head which looks at places and not at
    words gains nothing. With them [row, query, key]: from the word asked, 1 at every place of its label and -1 at those
    of the other; None where there is no room for two words of each.
    """
    start = _start(model)
    n = min(SHOTS, (_room(model) - len(start) - 1) // 2, len(allowed) - 2) // 2 * 2
    if n < 4:
        return model.inputs([list(allowed[:2])]), None
    length = len(start) + 2 * n + 1
    rows, signs = [], torch.zeros(2 * count, length, length)
    for b in range(count):
        drawn = draw(allowed, n + 2, generator)
        kinds = torch.arange(n)[torch.randperm(n, generator=generator)] % 2
        text = [*start, *torch.stack([drawn[:n], drawn[n:][kinds]], 1).flatten().tolist()]
        for kind in (0, 1):
            some = (kinds == kind).nonzero()[:, 0]
            asked = some[int(torch.randint(len(some), (), generator=generator))]
            rows.append([*text, int(drawn[asked])])
            places = len(start) + 1 + 2 * torch.arange(n)
            signs[2 * b + kind, -1, places] = torch.where(kinds == kind, 1.0, -1.0)
    return model.inputs(rows), signs


def draw(allowed: Sequence[int], n: int, generator: torch.Generator) -> Tensor:
    """[n] different ids of ``allowed``."""
    return torch.tensor(allowed)[torch.randperm(len(allowed), generator=generator)[:n]]
