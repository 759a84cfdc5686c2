"""A checkpoint's numbers, published or quantized: stacks of experts as stored, anything else as bf16.

May import checkpoint, model and quant. Knows no recipe and no run.
"""
