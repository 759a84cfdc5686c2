"""Tokens, and the statistics that they leave in a model: Gram matrices, coverage, shrinkage.

May import model and shipped. Knows no plan, no recipe's syntax and no file but the data's and the tokenizer's.
"""
