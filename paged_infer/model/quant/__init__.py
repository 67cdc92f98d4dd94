"""Weights of few bits: the schemes, and the methods that choose the codes."""
