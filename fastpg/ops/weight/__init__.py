"""Which tokens count, and by how much."""
