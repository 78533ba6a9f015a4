"""The comparison on real pretrained weights: tasks, arms, and readings of the paper as candidates."""
