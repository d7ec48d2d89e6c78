"""Methods that show what is inside a model."""
