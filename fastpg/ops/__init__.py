"""One page per op: the formula, the reference, the schema, the autograd function, the call."""
