"""The settings of a run: what they are, which values are legal, and how text becomes them."""
