"""Bridges to code, names and files of other MAML implementations."""
