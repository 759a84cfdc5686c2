"""Compiled loops (numba, Triton) and what they share. Bytes are those of plain torch; knows no method."""
