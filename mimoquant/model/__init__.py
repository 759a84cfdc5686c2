"""Names, geometry and the forward pass of the MiMo-V2 family.

May import checkpoint and machine. Knows no format and no method of quantization.
"""
