"""Forms of what a method reads: prompts, images and results made before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cutaway.core.errors import ImageError
from cutaway.core.forms.base import IN_MEMORY, Form, ModelLike, as_ids, described, in_memory, refuse_in_memory

_IDS = re.compile(r"\s*#\d+(?:\s+#\d+)*\s*")


class PromptForm(Form):
    """One prompt. A text that would read as ids is written with a backslash before it: ``\\#12`` is the text '#12'."""

    name, says, from_file = "prompt", "its text, or token ids as '#12 #7 #99'", True

    def parse(self, text: str) -> Any:
        if _IDS.fullmatch(text):
            return tuple(int(word[1:]) for word in text.split())
        return text[1:] if text.startswith("\\") and self._special(text.lstrip("\\")) else text

    @staticmethod
    def _special(text: str) -> bool:
        return bool(_IDS.fullmatch(text)) or text.startswith(IN_MEMORY)

    def text(self, value: Any) -> str:
        if isinstance(value, str):
            return "\\" + value if self._special(value.lstrip("\\")) else value
        if isinstance(value, tuple):
            return " ".join(f"#{i}" for i in value)
        if value.extra:
            return in_memory(f"inputs {value.digest}")
        return " ".join(f"#{i}" for i in value.ids[0][value.mask[0].bool()].tolist())

    def accept(self, given: Any) -> Any:
        if isinstance(given, str):
            return self.parse(refuse_in_memory(given))
        if _is_inputs(given):
            if len(given) != 1:
                raise ValueError(f"it has {len(given)} rows and one prompt is wanted")
            return given
        ids = as_ids(given)
        if ids is None:
            raise ValueError(f"it is {described(given)}")
        return ids

    def value(self, value: Any, model: ModelLike) -> Any:
        return list(value) if isinstance(value, tuple) else value

    def content(self, value: Any) -> bytes:
        return (value.digest if _is_inputs(value) else self.text(value)).encode()


class PromptsForm(Form):
    """One prompt or several."""

    name, many, from_file = "prompts", True, True
    says = """a prompt or a JSON list of them ["one", "two"]; ids as '#12 #7 #99'"""
    one = PromptForm()

    def parse(self, text: str) -> tuple[Any, ...]:
        try:
            listed = json.loads(text) if text.lstrip().startswith("[") else None
        except ValueError:
            listed = None
        if isinstance(listed, list) and listed and all(isinstance(each, str) for each in listed):
            return tuple(self.one.parse(refuse_in_memory(each)) for each in listed)
        return (self.one.parse(text),)

    def text(self, value: Any) -> str:
        if _is_inputs(value):
            if value.extra:
                return in_memory(f"inputs {value.digest}")
            value = tuple(tuple(i[m.bool()].tolist()) for i, m in zip(value.ids, value.mask, strict=True))
        texts = [self.one.text(each) for each in value]
        if len(texts) == 1 and self.parse(texts[0]) == value:
            return texts[0]
        return json.dumps(texts, ensure_ascii=False)

    def accept(self, given: Any) -> Any:
        if isinstance(given, str):
            return self.parse(refuse_in_memory(given))
        if _is_inputs(given):
            return given
        ids = as_ids(given)
        if ids is not None:
            return (ids,)
        plain = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(plain, list | tuple) or not plain:
            raise ValueError(f"it is {described(given)}")
        found = tuple(self.one.accept(each) for each in plain)
        if len({type(each) for each in found}) > 1:
            raise ValueError("it mixes texts and token ids")
        return found

    def value(self, value: Any, model: ModelLike) -> Any:
        if _is_inputs(value):
            return value
        rows = [self.one.value(each, model) for each in value]
        if isinstance(rows[0], list) and len({len(row) for row in rows}) == 1:
            import torch

            return torch.tensor(rows)
        return rows

    def content(self, value: Any) -> bytes | None:
        return (value.digest if _is_inputs(value) else self.text(value)).encode()


class WordsForm(PromptsForm):
    """Words of a prompt, or of each of several; the method receives texts or lists of ids."""

    name, from_file = "words", False
    says = """words as they stand there, ids as '#12 #7', or a JSON list of them ["one", "two"]"""

    def accept(self, given: Any) -> Any:
        if _is_inputs(given):
            raise ValueError(f"it is {described(given)}")
        return super().accept(given)

    def value(self, value: Any, model: ModelLike) -> Any:
        return [self.one.value(each, model) for each in value]

    def content(self, value: Any) -> bytes | None:
        return None


class ImageForm(Form):
    """An image."""

    name, says = "image", "the path of an image file"

    def parse(self, text: str) -> str:
        return text

    def text(self, value: Any) -> str:
        named = value if isinstance(value, str) else str(getattr(value, "filename", "") or "")
        return named or in_memory(f"image {value.width}x{value.height}")

    def accept(self, given: Any) -> Any:
        if isinstance(given, str | Path):
            return refuse_in_memory(str(given))
        from PIL.Image import Image as PILImage

        return given if isinstance(given, PILImage) else super().accept(given)

    def value(self, value: Any, model: ModelLike) -> Any:
        if not isinstance(value, str):
            return value
        from PIL import Image as PILImages

        try:
            with PILImages.open(value) as image:
                image.load()
        except FileNotFoundError:
            raise ImageError(f"image {value!r}", "there is no such file", "give the path of an image") from None
        except (OSError, ValueError, PILImages.DecompressionBombError) as error:
            raise ImageError(f"image {value!r}", f"it cannot be read ({error})", "give a PNG or JPEG file") from None
        return image

    def content(self, value: Any) -> bytes:
        if isinstance(value, str):
            return Path(value).read_bytes() if Path(value).is_file() else b""
        return f"{value.mode}{value.size}".encode() + value.tobytes()


class ResultForm(Form):
    """A result of one kind, made before."""

    name = "result"

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.says = f"the folder of a saved {kind.__name__}"

    def parse(self, text: str) -> str:
        return text

    def text(self, value: Any) -> str:
        return value if isinstance(value, str) else in_memory(f"{value.kind} {value.title!r}")

    def accept(self, given: Any) -> Any:
        if isinstance(given, Path):
            return str(given)
        return given if isinstance(given, self.kind) else super().accept(given)

    def value(self, value: Any, model: ModelLike) -> Any:
        from cutaway.core.result_file import open_result

        found = open_result(value) if isinstance(value, str) else value
        if not isinstance(found, self.kind):
            raise ValueError(  # noqa: TRY004 - a wrong folder, not a wrong type
                f"{value!r} holds a {found.kind}, not a {self.kind.__name__}"
            )
        return found

    def content(self, value: Any) -> bytes:
        from cutaway.core.result_file import open_result, to_json

        found = open_result(value) if isinstance(value, str) else value
        return to_json(found.replace(made_by=None, notes=())).encode()


def _is_inputs(value: Any) -> bool:
    from cutaway.core.inputs import Inputs

    return isinstance(value, Inputs)
