"""mimoquant: the fastest and most faithful way to a 4-bit MiMo-V2 checkpoint."""

__version__ = "0.1.0"
