"""Numbers: FP8 blocks, 4-bit formats, scale search. Arrays in, arrays out; knows no file and no model.

`engine_cpu` (fused, compiled) and `engine_torch` (any device, the plain reference) do the same arithmetic in the same
order in float32, so they give the same bytes; a test holds that.
"""
