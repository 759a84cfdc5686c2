"""Names, geometry and the forward pass of the MiMo-V2 family.

May import checkpoint and machine, and of quant how kernels round activations. Knows no format of weights and no method.
"""
