"""Names and geometry of the MiMo-V2 family: which tensor is what, and how fused qkv rows are ordered."""
