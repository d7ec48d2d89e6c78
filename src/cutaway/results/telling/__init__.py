"""An explanation told: in sentences, on a terminal, as a page."""
