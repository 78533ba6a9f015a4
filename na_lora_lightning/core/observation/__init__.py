"""Looks at pre-activations while a model trains."""
