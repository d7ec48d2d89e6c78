"""What mkdocs.yml cannot say: pages named by a pattern in the navigation, and nothing loaded from another host."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.cutaway")
FETCHED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"' >]+|<link\b[^>]*>")
STYLES = re.compile(
    r"rel=[\"']?(?:stylesheet|preconnect|preload|icon)[^>]*href=[\"']?(?:https?:)?//|"
    r"href=[\"']?(?:https?:)?//[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon)"
)


def expanded(items: list[Any], docs: Path) -> Iterator[Any]:
    """The navigation with each pattern ("methods/*.md") replaced by the pages it matches, index first, each once."""
    named = {item for item in items if isinstance(item, str)}
    for item in items:
        if isinstance(item, dict):
            for title, inside in item.items():
                yield {title: list(expanded(inside, docs)) if isinstance(inside, list) else inside}
        elif "*" in item:
            yield from (
                str(page) for page in sorted(p.relative_to(docs) for p in docs.glob(item)) if str(page) not in named
            )
        else:
            yield item


def on_config(config: Any) -> Any:
    """Expand the patterns; a page that no entry matches is then reported by MkDocs itself."""
    config.nav = list(expanded(config.nav, Path(config.docs_dir)))
    return config


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn (an error when strict) of a page that would load something from another host."""
    for found in FETCHED.findall(output):
        if not found.startswith("<link") or STYLES.search(found):
            log.warning("%s loads from another host: %s", page.file.src_path, found[:120])
    return output
