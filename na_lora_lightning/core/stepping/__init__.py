"""Acts on the optimizer's step."""
