"""Running the model well: sweeps by replay."""

from __future__ import annotations

from cutaway.engine.replay import Replayed, replay

__all__ = ["Replayed", "replay"]
