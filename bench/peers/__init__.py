"""The same meta-gradient by what a user would pick instead; ``python -m bench.peers`` times them all."""
