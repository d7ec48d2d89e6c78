"""Stand between modules and the functions that transformers' interfaces hand them.

Attention and experts modules look their function up at each call, in a registry object of transformers, and give their
own plain function as the default. While someone watches, that look-up is answered with a function of ours, which knows
the module, the function that would have run and the module's own one. No configuration and no module is changed, so
masks and kernels stay what they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Function = Callable[..., Any]
Handler = Callable[..., Any]
"""``handler(native, own, module, *args, **kwargs)``: what runs in place of ``native(module, *args, **kwargs)``."""


class Interface:
    """One registry of transformers whose look-ups can be answered by handlers, module by module."""

    def __init__(self, registry: Callable[[], Any]) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._handlers: dict[tuple[int, int], list[Handler]] = {}

    def _answer(self, implementation: str | None, default: Function) -> Function:
        registry = self._registry()
        native = type(registry).get_interface(registry, implementation, default)

        def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
            handlers = self._handlers.get((threading.get_ident(), id(module)))
            if not handlers:
                return native(module, *args, **kwargs)
            return handlers[-1](native, default, module, *args, **kwargs)

        return watched

    @contextmanager
    def watch(self, handlers: Mapping[int, Handler]) -> Iterator[None]:
        """While open, calls that this thread makes of the modules with these ids go to their (innermost) handlers."""
        if not handlers:
            yield
            return
        registry = self._registry()
        thread = threading.get_ident()
        with self._lock:
            for module, handler in handlers.items():
                self._handlers.setdefault((thread, module), []).append(handler)
            registry.get_interface = self._answer
        try:
            yield
        finally:
            with self._lock:
                for module, handler in handlers.items():
                    key = thread, module
                    self._handlers[key].remove(handler)
                    if not self._handlers[key]:
                        del self._handlers[key]
                if not self._handlers:
                    registry.__dict__.pop("get_interface", None)


def _attention() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _experts() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


ATTENTION = Interface(_attention)
EXPERTS = Interface(_experts)
