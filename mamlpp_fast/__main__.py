"""``python -m mamlpp_fast``: the same as the command ``mamlpp-fast``."""

import sys

from mamlpp_fast.cli import main

sys.exit(main())
