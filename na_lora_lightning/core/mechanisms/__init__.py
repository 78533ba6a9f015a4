"""The two mechanisms: the temporal-importance mask and the step scale."""
