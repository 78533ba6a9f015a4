"""From the name of a model to a PEFT model."""
