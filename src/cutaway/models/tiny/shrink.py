"""From a configuration class to a tiny configuration of it, by inspecting the names and values of its default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cutaway.core.errors import UnsupportedError, nearest
from cutaway.models.tiny import rules
from cutaway.models.tiny.overrides import DEFAULTS, OVERRIDES
from cutaway.models.tiny.rules import TEXT, TOWER, Size

DEPTH_NAMES = [name for name, sized in rules.SIZED.items() if sized == "layers"]
_KEEP = object()  # the default value stays


def tiny_config(config_class: type, changes: Mapping[str, Any] | None = None) -> Any:
    """A tiny configuration of ``config_class``; ``changes`` come last (``text_config__vocab_size`` reaches inside)."""
    default = config_class(**DEFAULTS.get(config_class.__name__, {}))
    return _shrunk(default, "", {}, _special_ids(default), _nested(changes or {}))


@dataclass(frozen=True)
class _Place:
    """What the rules for one (sub-)configuration may look at."""

    config: Any
    size: Size
    kept: list[int]  # the layers of the default that the tiny layers stand for
    ids: Mapping[str, int]


def _shrunk(
    default: Any, key: str, start: Mapping[str, Any], ids: Mapping[str, int], changes: Mapping[str, Any]
) -> Any:
    """``default`` made small; ``key`` is where it stands, ``start`` what its parent asks of it."""
    _refuse_unknown(default, changes)
    size = TOWER if any(part in key for part in rules.TOWER_NAMES) else TEXT
    place = _Place(default, size, _kept_layers(default, size, changes), ids)
    own = _nested(OVERRIDES.get(type(default).__name__, {}))
    given = {name: _small_or_same(name, value, place) for name, value in start.items()}
    for field in fields(default):
        value = _value(default, field.name)
        if _is_config(value):
            inner = {**own.pop(field.name, {}), **_dict(changes.get(field.name))}
            begin = _start(default, field.name)
            given[field.name] = _shrunk(value, f"{key}.{field.name}", begin, ids, inner)
        elif (small := _small(field.name, value, place)) is not _KEEP:
            given[field.name] = small
    if overrides := _layer_overrides(default):
        given["per_layer_config"] = {
            i: {k: _raised(k, v, place) for k, v in overrides[j].items()}
            for i, j in enumerate(place.kept)
            if j in overrides
        }
    if not key:
        given |= {k: v for k, v in rules.FLAGS.items() if hasattr(default, k)}
    given |= own
    given |= {k: v for k, v in changes.items() if not _is_config(_value(default, k))}
    return type(default)(**given)


def _small_or_same(name: str, value: Any, place: _Place) -> Any:
    small = _small(name, value, place)
    return value if small is _KEEP else small


def _small(name: str, value: Any, place: _Place) -> Any:
    """The tiny value of one attribute, or ``_KEEP``."""
    if name == "rope_parameters":
        return _rope(value, place)
    if value is None and name in rules.IMAGE_TOKEN_NAMES:
        return place.ids[_stem(name)]
    if value is None:
        return (
            getattr(place.size, rules.SIZED[name])
            if name in rules.SIZED_WHEN_NONE
            else rules.WHEN_NONE.get(name, _KEEP)
        )
    if isinstance(value, (bool, str)) or name.startswith("_"):
        return _KEEP
    if _is_special(name):
        inside = [v if 0 <= v < rules.FIRST_WORD else place.ids[_stem(name)] for v in _listed(value)]
        return inside[0] if isinstance(value, int) else inside
    if name in rules.LAYER_INDEX_LISTS:
        return [len(place.kept) - 1] if len(value) else _KEEP
    if isinstance(value, (int, float)):
        return _small_number(name, value, place)
    if isinstance(value, (list, tuple)) and len(value) == _depth(place.config):
        if _is_range(value):
            return list(range(len(place.kept)))
        sized = rules.SIZED.get(name)
        return [getattr(place.size, sized) if sized else value[j] for j in place.kept]
    return rules.FIXED_LISTS.get(name, _KEEP)


def _small_number(name: str, value: float, place: _Place) -> Any:
    sized = rules.SIZED.get(name)
    if sized == "layers":
        return len(place.kept)
    if _value(place.config, "kv_lora_rank") and sized == "kv_heads":
        return place.size.heads  # latent attention has one key per query head
    if _value(place.config, "kv_lora_rank") and name == "head_dim" and value == place.config.qk_rope_head_dim:
        return rules.FIXED["qk_rope_head_dim"]  # and there, some call the rotary part the head
    if sized:
        return getattr(place.size, sized)
    if name in rules.AT_MOST:
        return min(value, rules.AT_MOST[name])
    return rules.FIXED.get(name, _KEEP) if value > 0 else _KEEP


def _raised(name: str, value: Any, place: _Place) -> Any:
    """The tiny value of a per-layer override: twice the common one where the default has more than the common one."""
    small, common = _small(name, value, place), _value(place.config, name)
    if small is _KEEP:
        return value
    return small * 2 if isinstance(small, int) and common and value > common else small


def _refuse_unknown(config: Any, changes: Mapping[str, Any]) -> None:
    # transformers keeps attributes that it does not know without a word
    for name in changes:
        if name not in vars(config) and not hasattr(config, name):
            known = [field.name for field in fields(config)]
            raise UnsupportedError(
                f"{name!r} of a tiny {type(config).__name__}", "no such attribute", nearest(name, known)
            )


def _kept_layers(config: Any, size: Size, changes: Mapping[str, Any]) -> list[int]:
    """The fewest first layers that show every kind of layer; the last of them repeated up to the usual number."""
    wanted = next((changes[name] for name in DEPTH_NAMES if name in changes), None)
    kept = _telling_layers(config) or list(range(size.layers))
    kept += [kept[-1]] * (max(size.layers, wanted or 0) - len(kept))
    return kept[:wanted]


def _telling_layers(config: Any) -> list[int]:
    """The first layer of each kind: a kind is what the lists with one entry per layer say of it."""
    depth = _depth(config)
    lists = [_value(config, field.name) for field in fields(config)]
    per_layer = [v for v in lists if isinstance(v, (list, tuple)) and len(v) == depth and not _is_range(v)]
    overrides = _layer_overrides(config)
    seen: set[str] = set()
    kept: list[int] = []
    for layer in range(depth):
        kinds = {f"{i}:{v[layer]}" for i, v in enumerate(per_layer)} | {f"override:{sorted(overrides.get(layer, ()))}"}
        if not kinds <= seen:
            seen |= kinds
            kept.append(layer)
    return kept


def _rope(value: Any, place: _Place) -> Any:
    """Rotary parameters: the sections of multimodal rotary embeddings must add up to half of the tiny head."""
    if "mrope_section" not in getattr(place.config, "ignore_keys_at_rope_validation", ()):
        return _KEEP
    if not isinstance(value, dict) or not value:
        return _KEEP
    if all(isinstance(v, dict) for v in value.values()):
        return {k: _rope(v, place) for k, v in value.items()}
    half = int(place.size.head_dim * value.get("partial_rotary_factor", 1)) // 2
    side = half // 3
    return {**value, "mrope_section": [half - 2 * side, side, side]}


def _start(config: Any, name: str) -> dict[str, Any]:
    """What a configuration asks of a sub-configuration when it makes the default one."""
    spec = type(config).sub_configs_defaults.get(name)
    return dict(spec.init_kwargs) if spec is not None else {}


def _is_range(values: Sequence[Any]) -> bool:
    return list(values) == list(range(len(values)))


def _value(config: Any, name: str) -> Any:
    # Attributes that vary per layer refuse getattr; their common value is in the instance.
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def _depth(config: Any) -> int:
    counts = [_value(config, name) for name in DEPTH_NAMES]
    return next((count for count in counts if isinstance(count, int)), 0)


def _layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    spec = vars(config).get("_heterogeneity_spec")
    return spec.per_layer_overrides if spec is not None else {}


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict") and hasattr(value, "model_type")


def _is_special(name: str) -> bool:
    return name.endswith(rules.SPECIAL_ENDINGS)


def _stem(name: str) -> str:
    """``image`` for ``image_token_id`` and ``image_token_index``: both mean the same token."""
    for ending in rules.SPECIAL_ENDINGS:
        name = name.removesuffix(ending)
    return name


def _listed(value: int | Sequence[int] | None) -> list[int]:
    return [value] if isinstance(value, int) else list(value or ())


def _special_ids(config: Any) -> dict[str, int]:
    """An id inside the tiny vocabulary for each special token that lies outside of it."""
    room = rules.VOCAB - rules.FIRST_SPECIAL
    return {stem: rules.FIRST_SPECIAL + i % room for i, stem in enumerate(sorted(_special_stems(config)))}


def _special_stems(config: Any) -> set[str]:
    found: set[str] = set()
    for field in fields(config):
        value = _value(config, field.name)
        if _is_config(value):
            found |= _special_stems(value)
            continue
        unnamed = value is None and field.name in rules.IMAGE_TOKEN_NAMES
        if unnamed or (_is_special(field.name) and any(not 0 <= v < rules.FIRST_WORD for v in _listed(value))):
            found.add(_stem(field.name))
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """``{"text_config__hidden_size": 32}`` as ``{"text_config": {"hidden_size": 32}}``."""
    tree: dict[str, Any] = {}
    for name, value in changes.items():
        node = tree
        *parents, last = name.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
