"""Methods that intervene to show what is a cause."""
