"""Numbers: FP8 blocks, 4-bit formats, searches, methods. Arrays in, arrays out.

Imports nothing of ours; knows no file and no model. Both engines do the same float32 arithmetic in the same order.
"""
