"""One page about one run or several, from what they wrote; needs neither the model nor torch."""
