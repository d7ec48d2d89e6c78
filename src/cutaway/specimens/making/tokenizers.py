"""Fast tokenizers of the specimens, trained or listed here: no download, no file of unknown origin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A piece is a word, one digit or one sign, each with the space before it: so every digit is a token of its own
# (sums are learnt only so) and " Alder" is one token wherever it stands.
PIECE = r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s"


def byte_pair(texts: Iterable[str], *, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges make one token of every piece of ``texts``; any text can be encoded.

    Every piece counts the same, so training stops by itself when all of them are whole. A text that does not start
    with a space is read as if it did, so a word is the same token at the start of a sentence and inside it. ``<s>``
    is put in front of every sequence.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pieces = sorted({piece for text in texts for piece in re.findall(PIECE, f" {text}")})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A {2}"), " ")])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECE), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(pieces) * max(map(len, pieces)) + len(byte_level.alphabet()),
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return _wrapped(tokenizer, special)


def word_level(words: Sequence[str], *, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word or sign of ``words``; anything else is ``<unk>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    entries = ["<pad>", "<s>", "</s>", "<unk>", *special, *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer, special, unk_token="<unk>")


def _wrapped(tokenizer: object, special: Sequence[str], **more: str) -> PreTrainedTokenizerFast:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    start = tokenizer.token_to_id("<s>")  # type: ignore[attr-defined]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(special),
        clean_up_tokenization_spaces=False,
        **more,
    )
