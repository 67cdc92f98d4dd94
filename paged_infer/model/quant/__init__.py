"""Quantised weights: the schemes, the methods that choose the codes, and the formats of checkpoints."""
