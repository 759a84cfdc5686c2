"""The version of the program, and that of the JSON documents that it prints and reads."""

__version__ = "0.1.0"
SCHEMA_VERSION = 1
