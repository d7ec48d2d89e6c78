"""Forms of what a method looks at and does: tokens, sites, metrics, layers, positions, interventions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cutaway.core.forms.base import Form, ModelLike, as_ids, described, in_memory, refuse_in_memory
from cutaway.core.site import ROLES, Items, Site, parse_sites

if TYPE_CHECKING:
    from cutaway.core.metric import Metric


class TargetForm(Form):
    """One token. A token whose own text is '#11' is named by its id."""

    name, says = "token", "its text, outer spaces included, or its id as '#11'"

    def parse(self, text: str) -> str | int:
        return int(text[1:]) if re.fullmatch(r"#\d+", text) else text

    def text(self, value: str | int) -> str:
        return f"#{value}" if isinstance(value, int) else value

    def accept(self, given: Any) -> str | int:
        ids = as_ids([given.item() if hasattr(given, "item") else given])
        return ids[0] if ids else super().accept(given)

    def value(self, value: str | int, model: ModelLike) -> int:
        return model.token(value)


class SitesForm(Form):
    """Places in the model."""

    name, says = "sites", "sites separated by commas, as 'L*.resid_post, L3.attn.z[5]'"

    def parse(self, text: str) -> tuple[Site, ...]:
        sites = tuple(parse_sites(text))
        if not sites:
            raise ValueError("it names no site")
        return sites

    def text(self, value: tuple[Site, ...]) -> str:
        return ", ".join(map(str, value))

    def accept(self, given: Any) -> tuple[Site, ...]:
        if isinstance(given, str):
            return self.parse(refuse_in_memory(given))
        parts = [given] if isinstance(given, Site) else given
        if not isinstance(parts, list | tuple) or not all(isinstance(each, str | Site) for each in parts) or not parts:
            raise ValueError(f"it is {described(given)}")
        return tuple(parse_sites(parts))

    def value(self, value: tuple[Site, ...], model: ModelLike) -> list[Site]:
        return list(value)


class MetricForm(Form):
    """What is measured in the output."""

    name, says = "metric", "as 'logit_diff: #11, #22', 'logprob: Paris @-1' or 'entropy'"

    def parse(self, text: str) -> str:
        return text.strip()

    def text(self, value: str | Metric) -> str:
        if isinstance(value, str):
            return value
        return in_memory(f"{value} against logits") if value.reference is not None else str(value)

    def accept(self, given: Any) -> str | Metric:
        if isinstance(given, str):
            return super().accept(given)
        from cutaway.core.metric import Metric

        return given if isinstance(given, Metric) else super().accept(given)

    def value(self, value: str | Metric, model: ModelLike) -> Metric:
        from cutaway.core.metric import Metric

        return Metric.parse(value, model) if isinstance(value, str) else value


class PositionsForm(Form):
    """Positions of a prompt."""

    name, says = "positions", f"as '-1', '0-3+7' or one of {', '.join(ROLES)}"

    def parse(self, text: str) -> Items | str:
        return text.strip() if text.strip() in ROLES else Items.parse(text, text)

    def accept(self, given: Any) -> Items | str:
        if isinstance(given, Items | str):
            return given if isinstance(given, Items) else self.parse(refuse_in_memory(given))
        plain = given.tolist() if hasattr(given, "tolist") else given
        listed = list(plain) if isinstance(plain, list | tuple | range) else [plain]
        if not listed or not all(isinstance(each, int) and not isinstance(each, bool) for each in listed):
            raise ValueError(f"it is {described(given)}")
        return Items.of(listed)


class TowerLayersForm(PositionsForm):
    """Layers of a tower that another parameter names; the method resolves them. '*' is all of them."""

    name, says = "layers", "as '*', '3', '0-5' or '0+2+-1'"

    def parse(self, text: str) -> Items | str:
        return "*" if text.strip() == "*" else Items.parse(text, text)


class LayersForm(TowerLayersForm):
    """Layers of the language model; '*' is all of them."""

    def value(self, value: Items | str, model: ModelLike) -> list[int]:
        if isinstance(value, str):
            return list(range(model.n_layers))
        return value.resolve(model.n_layers, "layer", f"layers '{value}'")


class InterventionsForm(Form):
    """Interventions to run under."""

    name, says, many = "interventions", "as 'zero L3.attn.z[5], scale L2.mlp.out 0.5'", True

    def parse(self, text: str) -> tuple[Any, ...]:
        from cutaway.core.intervention import parse_intervention

        return tuple(parse_intervention(part) for part in refuse_in_memory(text).split(",") if part.strip())

    def text(self, value: tuple[Any, ...]) -> str:
        return ", ".join(self._one(each) for each in value)

    @staticmethod
    def _one(value: Any) -> str:
        from cutaway.core.intervention import Mean, Zero

        word = f"{type(value).__name__.lower()} {value.site}"
        number = getattr(value, "value", None)
        if isinstance(number, int | float):
            return f"{word} {number!r}"
        plain = type(value) is Zero or (type(value) is Mean and number is None)
        return word if plain else in_memory(str(value))

    def accept(self, given: Any) -> tuple[Any, ...]:
        from cutaway.core.intervention import Intervention

        if isinstance(given, str):
            return self.parse(given)
        parts = given if isinstance(given, list | tuple) else [given]
        if not all(isinstance(each, str | Intervention) for each in parts):
            raise ValueError(f"it is {described(given)}")
        return tuple(one for part in parts for one in (self.parse(part) if isinstance(part, str) else (part,)))

    def value(self, value: tuple[Any, ...], model: ModelLike) -> list[Any]:
        return list(value)
