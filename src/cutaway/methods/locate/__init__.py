"""Methods that find what produced an answer."""
