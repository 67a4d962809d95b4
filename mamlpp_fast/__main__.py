"""``python -m mamlpp_fast``: the same as the command ``mamlpp-fast``."""

from mamlpp_fast.cli import run

run()
