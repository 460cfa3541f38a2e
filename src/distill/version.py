"""The version of the program, for all who print it."""

__version__ = "0.1.0"
