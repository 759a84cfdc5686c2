"""Compiled loops (numba, Triton) and what they share. Bytes are those of plain torch, but for sums that are products on
CUDA; knows no method."""
