"""Forms of what is run many times: cases, and the settings of the method that is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutaway.core.cases import Case, cases_of, read_cases
from cutaway.core.forms.base import Form, ModelLike, described, in_memory, join_list, refuse_in_memory, split_list


class CasesForm(Form):
    """Prompts with what is asked of each: a file, the name of a suite, or the cases themselves."""

    name = "cases"
    says = (
        "a file (.jsonl, .csv with a column 'prompt', or a prompt per line), a suite as 'town:city', or a JSON list; "
        "beside its prompt a case may have target, versus, image and type"
    )

    def parse(self, text: str) -> str | tuple[Case, ...]:
        if not text.lstrip().startswith("["):
            return text
        try:
            return cases_of(json.loads(text), "prompts")
        except ValueError as error:
            raise ValueError(f"it does not read as a JSON list ({error})") from None

    def text(self, value: str | tuple[Case, ...]) -> str:
        if isinstance(value, str):
            return value
        if any(case.image is not None and not isinstance(case.image, str) for case in value):
            return in_memory(f"{len(value)} cases with images")
        return json.dumps([case.as_json() for case in value], ensure_ascii=False)

    def accept(self, given: Any) -> str | tuple[Case, ...]:
        if isinstance(given, str | Path):
            return self.parse(refuse_in_memory(str(given)))
        if not isinstance(given, list | tuple):
            raise ValueError(f"it is {described(given)}")  # noqa: TRY004 - a value of the wrong kind, as everywhere here
        return cases_of(given, "prompts")

    def value(self, value: str | tuple[Case, ...], model: ModelLike) -> str | tuple[Case, ...]:
        """The cases; the name itself where there is no such file: suites are known further up."""
        return read_cases(Path(value)) if isinstance(value, str) and Path(value).is_file() else value

    def content(self, value: str | tuple[Case, ...]) -> bytes:
        if isinstance(value, str):
            return Path(value).read_bytes() if Path(value).is_file() else value.encode()
        return self.text(value).encode()


class SettingsForm(Form):
    """Parameters of a method that another one runs, as text."""

    name, many = "settings", True
    says = "as 'level=head, k=144'"

    def parse(self, text: str) -> tuple[tuple[str, str], ...]:
        pairs = [part.partition("=") for part in split_list(text)]
        wrong = next((name for name, sign, _ in pairs if not sign or not name.strip()), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} sets nothing")
        return tuple((name.strip(), value.strip()) for name, _, value in pairs)

    def text(self, value: tuple[tuple[str, str], ...]) -> str:
        return join_list(f"{name}={setting}" for name, setting in value)

    def accept(self, given: Any) -> tuple[tuple[str, str], ...]:
        if isinstance(given, str):
            return self.parse(refuse_in_memory(given))
        if isinstance(given, Mapping):
            words = {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in given.items()}
            return tuple(words.items())
        if isinstance(given, list | tuple):
            return tuple(
                pair for each in given for pair in ((tuple(each),) if isinstance(each, tuple) else self.parse(each))
            )
        raise ValueError(f"it is {described(given)}")

    def value(self, value: tuple[tuple[str, str], ...], model: ModelLike) -> dict[str, str]:
        return dict(value)
