"""Turn prompts, ids and images into Inputs, and token texts into ids."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from cutaway.core.errors import ImageError, InputError, TokenError
from cutaway.core.inputs import Inputs
from cutaway.models.upstream import input_embeddings, reason


class Encoder:
    """The tokenizer or processor of a model, and what the model says of its tokens."""

    def __init__(self, hf: nn.Module, processor: Any = None) -> None:
        self.hf, self.processor = hf, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        config: Any = hf.config
        self.config, self.text_config = config, config.get_text_config(decoder=True)

    # -- tokens -------------------------------------------------------------------------------------------------------
    @cached_property
    def vocabulary_size(self) -> int:
        """Rows of the token embedding."""
        weight = getattr(input_embeddings(self.hf), "weight", None)
        return int(weight.shape[0]) if weight is not None else int(self.text_config.vocab_size)

    def token(self, text: str | int) -> int:
        """The id of one token: its string, ``#11``, or an int.

        Raises:
            TokenError: an id outside the vocabulary, text that is several tokens (says how it is split), or none.
        """
        if isinstance(text, str) and text.startswith("#") and text[1:].isdigit():
            text = int(text[1:])
        if isinstance(text, int):
            if not 0 <= text < self.vocabulary_size:
                raise TokenError(
                    f"token #{text}", f"the vocabulary has ids 0-{self.vocabulary_size - 1}", "give one of them"
                )
            return text
        if self.tokenizer is None:
            raise TokenError(f"token {text!r}", "the model was made without a tokenizer", "give an id: '#11'")
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if not ids or (unknown in ids and text != self.tokenizer.unk_token):
            raise TokenError(f"token {text!r}", "the tokenizer does not know it", "give another word, or an id: '#11'")
        if len(ids) > 1:
            split = ", ".join(f"{self.decode(i)!r} #{i}" for i in ids)
            listed = ", ".join(f"#{i}" for i in ids)
            hint = f"name one of them; methods with a metric score all of them: 'answer: {listed}'"
            spaced = self.tokenizer.encode(" " + text, add_special_tokens=False)
            if len(spaced) == 1 and not text.startswith(" "):
                hint = f'with a leading space it is one token: " {text}" (#{spaced[0]}); or {hint}'
            raise TokenError(f"token {text!r}", f"it is split into {len(ids)} tokens: {split}", hint)
        return int(ids[0])

    def decode(self, token: int) -> str:
        """The string of a token id, spaces and line breaks as they are; ``#11`` without a tokenizer."""
        if self.tokenizer is None:
            return f"#{token}"
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"#{token}"
        if piece.isascii():
            return str(piece)
        if "▁" in piece:
            return str(piece).replace("▁", " ")
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    @cached_property
    def image_ids(self) -> set[int]:
        """Ids of the placeholders that image features replace."""
        names = ("image_token_id", "image_token_index", "media_placeholder_token_id")
        for source in (self.config, self.processor):  # a processor may call the token before the image its image token
            if found := {i for name in names if isinstance(i := getattr(source, name, None), int)}:
                return found
        return set()

    @cached_property
    def placeholder(self) -> str:
        """How the place of an image is written in a prompt; '' where the processor has no word for it."""
        if getattr(self.processor, "image_processor", None) is None:
            return ""
        return getattr(self.processor, "image_token", None) or getattr(self.tokenizer, "image_token", None) or ""

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids that are no text: begin, end, padding and the like."""
        return set(getattr(self.tokenizer, "all_special_ids", ())) - self.image_ids

    @cached_property
    def pad_id(self) -> int:
        """The id that fills short rows; any will do, since the mask hides it."""
        for source, name in (
            (self.tokenizer, "pad_token_id"),
            (self.config, "pad_token_id"),
            (self.config, "eos_token_id"),
        ):
            value = getattr(source, name, None)
            if isinstance(value, int) and 0 <= value < self.vocabulary_size:
                return value
        return 0

    # -- inputs -------------------------------------------------------------------------------------------------------
    def encode(self, prompt: Any, image: Any = None, *, padding_side: str = "right", template: bool = False) -> Inputs:
        """Inputs of a text, a list of texts, token ids, a mapping with input_ids, or Inputs (returned as they are).

        Args:
            prompt: str · list of str · ids as [pos] or [batch, pos] tensor or array, list of int, list of lists ·
                what a processor gives.
            image: an image or one list of images for the one prompt: PIL, or a path. A prompt without the processor's
                placeholder gets it through the chat template, or in front.
            padding_side: "left" or "right", for rows of unequal length.
            template: wrap a text into the chat template.

        Raises:
            InputError: empty, too long, of unknown type, or text without a tokenizer.
            ImageError: an image without a place in the prompt, a place without an image, or one that does not fit.
        """
        if isinstance(prompt, Inputs):
            return prompt
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side={padding_side!r}", "there is none of that name", "write 'left' or 'right'")
        if image is not None:
            return self._with_images(prompt, image if isinstance(image, list | tuple) else [image])
        if isinstance(prompt, Mapping):
            return self._from_features(dict(prompt), ())
        if not isinstance(prompt, Tensor) and hasattr(prompt, "__array__"):
            prompt = torch.as_tensor(prompt)  # numpy
        return self._from_rows([self._ids(row, template) for row in self._rows(prompt)], padding_side)

    def _rows(self, prompt: Any) -> list[Any]:
        if isinstance(prompt, Tensor):
            if prompt.is_floating_point() or prompt.ndim not in (1, 2):
                found = f"got a {list(prompt.shape)} tensor of {prompt.dtype}"
                raise InputError("token ids", found, "give integers, [pos] or [batch, pos]")
            return prompt.tolist() if prompt.ndim == 2 else [prompt.tolist()]
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, Sequence) and prompt:
            return [list(prompt)] if isinstance(prompt[0], Integral) else list(prompt)
        raise InputError("prompt", f"got {_what(prompt)}", "give a text or token ids")

    def _ids(self, row: Any, template: bool) -> list[int]:
        if isinstance(row, str):
            self._says_something(row)
            if self.placeholder and self.placeholder in row:
                raise self._no_image(f"prompt {row[:40]!r}", repr(self.placeholder))
            if self.tokenizer is None:
                found = "the model was made without a tokenizer"
                raise InputError(f"prompt {row[:40]!r}", found, "give token ids, or Model(hf, processor)")
            if template:
                if not getattr(self.tokenizer, "chat_template", None):
                    raise InputError("template=True", "the tokenizer has no chat template", "write the prompt out")
                messages = [{"role": "user", "content": row}]
                row = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(row, add_special_tokens=not template)["input_ids"]
        else:
            ids = row.tolist() if hasattr(row, "tolist") else row
            if not isinstance(ids, Sequence) or any(not isinstance(i, Integral) for i in ids):
                raise InputError("prompt", f"got {_what(ids)} among its rows", "give texts, or rows of token ids")
            ids = [self.token(int(i)) for i in ids]
        if not ids:
            raise InputError("prompt", "it has no tokens", "give a text or token ids")
        return list(ids)

    def _says_something(self, text: str) -> None:
        """InputError for the empty text, of which a tokenizer would make its start token alone, or nothing."""
        if not text:
            start = getattr(self.tokenizer, "bos_token_id", None)
            alone = f"; the start token alone is written '#{start}'" if isinstance(start, int) else ""
            raise InputError("prompt ''", "it is empty", f"give a text or token ids{alone}")

    def _no_image(self, asked: str, place: str) -> ImageError:
        reads = getattr(self.processor, "image_processor", None) is not None
        hint = f"give one: image='photo.png'; or leave {place} out" if reads else f"leave {place} out"
        return ImageError(asked, f"it has a place for an image, {place}, and none is given", hint)

    def _from_rows(self, rows: list[list[int]], side: str) -> Inputs:
        length = max(len(row) for row in rows)
        self._fits(length)
        pads = [[self.pad_id] * (length - len(row)) for row in rows]
        hides = [[0] * len(pad) for pad in pads]
        ones = [[1] * len(row) for row in rows]
        left = side == "left"
        ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([h + o if left else o + h for h, o in zip(hides, ones, strict=True)])
        extra: dict[str, Any] = {}
        if not bool(mask.all()) and left and "position_ids" in self._accepts:
            extra["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._named(ids, mask, extra)

    @cached_property
    def _accepts(self) -> set[str]:
        return set(inspect.signature(self.hf.forward).parameters)

    def _fits(self, length: int) -> None:
        limit = getattr(self.text_config, "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit < length:
            found = f"it has {length} tokens and the model {limit} positions"
            raise InputError("prompt", found, f"shorten it to {limit} tokens")

    def _named(self, ids: Tensor, mask: Tensor, extra: Mapping[str, Any], images: Sequence[Any] = ()) -> Inputs:
        def role(token: int, real: int) -> str:
            if not real:
                return "pad"
            return "image" if token in self.image_ids else "special" if token in self.special_ids else "text"

        listed = [list(zip(row.tolist(), m.tolist(), strict=True)) for row, m in zip(ids, mask, strict=True)]
        tokens = tuple(tuple(self.decode(i) for i, _ in row) for row in listed)
        roles = tuple(tuple(role(i, m) for i, m in row) for row in listed)
        inputs = Inputs(ids, mask, tokens, roles, dict(extra), images=tuple(images))
        pairs = (pair for text, role in zip(tokens, roles, strict=True) for pair in zip(text, role, strict=True))
        place = next((token for token, what in pairs if what == "image"), None)
        if place is not None and not inputs.has_images:
            raise self._no_image("a prompt of token ids", repr(place))
        if not images:
            return inputs
        if place is None and self.image_ids:
            written = repr(self.placeholder) if self.placeholder else "its token"
            hint = f"write {written} where it belongs"
            raise ImageError("an image", "the prompt has no place for it", hint)
        from cutaway.models.patches import patch_grids

        return replace(inputs, grids=patch_grids(inputs, self.config, self.processor))

    def _with_images(self, prompt: Any, images: Sequence[Any]) -> Inputs:
        if self.processor is None or getattr(self.processor, "image_processor", None) is None:
            name = type(self.hf).__name__
            raise ImageError(
                "an image", f"{name} was loaded without an image processor", "give a model that reads images"
            )
        if isinstance(prompt, (list, tuple)) and len(prompt) == 1:  # a batch of one text
            prompt = prompt[0]
        if not isinstance(prompt, str):
            several = isinstance(prompt, (list, tuple)) and all(isinstance(each, str) for each in prompt)
            found = f"got {len(prompt)} texts" if several else f"got {type(prompt).__name__}"
            raise InputError("a prompt with an image", found, "give one text per call")
        self._says_something(prompt)
        opened = [open_image(image) for image in images]
        text = self._place_images(prompt, len(opened))
        try:
            with warnings.catch_warnings():  # what processors of transformers call outdated in numpy or in themselves
                warnings.simplefilter("ignore", DeprecationWarning)
                features = self.processor(text=[text], images=opened, return_tensors="pt")
        except (ValueError, IndexError, RuntimeError, TypeError) as error:
            sizes = ", ".join(f"{im.width}x{im.height}" for im in opened)
            found = f"the processor refused them: {reason(error)}"
            places = text.count(self.placeholder) if self.placeholder else len(opened)
            hint = "try another size or one image" if places == len(opened) else "write one placeholder for each image"
            raise ImageError(f"{len(opened)} image(s) of {sizes} pixels", found, hint) from error
        return self._from_features(dict(features), opened)

    def _place_images(self, prompt: str, n: int) -> str:
        if self.placeholder and self.placeholder in prompt:
            return prompt
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": "image"} for _ in range(n)), {"type": "text", "text": prompt}]
            wrapped = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            return str(wrapped)
        return f"{self.placeholder * n}{prompt}"

    def _from_features(self, features: dict[str, Any], images: Sequence[Any]) -> Inputs:
        side = "decoder_" if "decoder_input_ids" in features else ""
        if f"{side}input_ids" not in features:
            raise InputError("inputs", f"a mapping with {sorted(features)}", "it must hold input_ids")
        features.pop("labels", None)  # PaliGemma's processor adds them; they would only ask for a loss
        try:
            features = {k: torch.as_tensor(v) if isinstance(v, list) else v for k, v in features.items()}
        except (ValueError, TypeError) as error:
            found = f"rows of unequal length ({reason(error)})"
            raise InputError("inputs", found, "pad them, or give a list of texts") from error
        ids = torch.as_tensor(features.pop(f"{side}input_ids"))
        ids = ids[None] if ids.ndim == 1 else ids
        if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
            raise InputError("input_ids", f"got {list(ids.shape)} of {ids.dtype}", "give integers, [batch, pos]")
        mask = torch.as_tensor(features.pop(f"{side}attention_mask", torch.ones_like(ids)))
        mask = mask[None] if mask.ndim == 1 else mask
        if mask.shape != ids.shape:
            found = f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)}"
            raise InputError("inputs", found, "both are [batch, pos]")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocabulary_size:
            self.token(low if low < 0 else high)
        self._fits(ids.shape[1])
        return replace(self._named(ids, mask, features, images), side=side)

    def sample(self) -> Inputs:
        """A few tokens, enough to run the model once; as many as no model has heads, so that axes are told apart."""
        n = 13
        avoid = self.special_ids | self.image_ids
        ids = [i for i in range(3, min(self.vocabulary_size, 4096)) if i not in avoid][:n]
        ids = ids if len(ids) == n else [i % self.vocabulary_size for i in range(n)]
        return self._from_rows([ids], "right")

    def image_sample(self) -> Inputs | None:
        """A word and a grey image, so that the vision tower runs once; None when there is no image processor."""
        if getattr(self.processor, "image_processor", None) is None:
            return None
        from PIL import Image

        size = getattr(getattr(self.config, "vision_config", None), "image_size", None)
        side = size if isinstance(size, int) and size > 0 else 64
        return self.encode("a", Image.new("RGB", (side, side), "grey"))


def _what(value: Any) -> str:
    empty = value is None or (hasattr(value, "__len__") and len(value) == 0)
    return "nothing" if empty else type(value).__name__


def open_image(image: Any) -> Any:
    """The RGB image of a path or a PIL image; ImageError when it cannot be read."""
    from pathlib import Path

    from PIL import Image, UnidentifiedImageError

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, str | Path):
        raise ImageError("an image", f"got {type(image).__name__}", "give a path or a PIL image")
    path = Path(image)
    if not path.is_file():
        there = "a folder" if path.is_dir() else "no such file"
        raise ImageError(f"image '{path}'", there, "check the path")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"image '{path}'", f"it cannot be read as an image ({type(error).__name__})", "give a PNG or JPEG"
        ) from error
