"""One cell at a time: its specification, training, probes and result, run again or packed."""
