"""Bytes on disk: index, reader, writer, journal, side files. Knows no model and no quantization."""
