"""What inspection cannot infer: per configuration class, the attributes to set.

``default`` goes into building the default configuration as well (needed where a bare default does not validate);
``set`` only into the tiny one, over what the rules chose.
"""

from __future__ import annotations

from typing import Any

from cutaway.models.tiny.rules import TEXT, TOWER

OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    # hidden_size here is the width that the tower hands to the text; embed_dim is its own
    "Qwen2VLVisionConfig": {"set": {"hidden_size": TEXT.width, "embed_dim": TOWER.width}},
}
