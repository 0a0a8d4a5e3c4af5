"""Small tasks that need no download."""
