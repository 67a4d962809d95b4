"""Damaged and hostile inputs by the hundred thousand; see ``python -m bench.fuzz --help``."""
