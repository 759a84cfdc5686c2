"""What inference engines accept: contracts as data, a check of a checkpoint against them, launch commands.

May import planning and weights. Runs no engine and loads no tensor.
"""
