"""The losses of tokens, values and preferences."""
