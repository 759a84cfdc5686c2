"""Tokens, and the statistics that they leave in a model."""
