"""Maths that several methods share: frozen readouts, certified top-k, what components write, add and cost."""
