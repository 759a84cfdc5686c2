"""Bytes on disk: index, reader, writer, journal, side files.

May import machine. Knows no model and no quantization.
"""
