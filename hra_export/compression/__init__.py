"""Fewer reflections for nearly the same rotation: components of a chain, which to keep, and what that costs."""
