"""The nearest chain of reflections to any change of weights."""
