"""Bytes on disk: which files may be opened, index, reader, writer, journal, side files.

May import machine. Knows no model and no quantization.
"""
