"""A tiny randomly initialised model of any causal-LM or image-text-to-text class of transformers, with inputs for it.

    tiny("LlamaForCausalLM").hf                     # 3 layers, 4 heads, 0.1 M parameters, no download
    tiny("LlavaForConditionalGeneration").inputs    # ids with image placeholders, attention mask, pixels

Everything follows from the class's own configuration: ``rules`` says how large each named dimension is, ``shrink``
applies it, ``weights`` draws, ``inputs`` asks ``forward`` what it takes; ``overrides`` holds what cannot be inferred.
"""

from __future__ import annotations

from cutaway.models.tiny.build import TASKS, TinyModel, architectures, tiny

__all__ = ["TASKS", "TinyModel", "architectures", "tiny"]
