"""Running the model well: sweeps by replay."""

from __future__ import annotations

from cutaway.engine.replay import Replayed, plan_memory, replay

__all__ = ["Replayed", "plan_memory", "replay"]
