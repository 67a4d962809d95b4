"""The paper's tables again: its rows trained over seeds, printed beside the published figures."""

from mamlpp_fast.reproduce.experiments import TABLES
from mamlpp_fast.reproduce.run import reproduce

__all__ = ["TABLES", "reproduce"]
