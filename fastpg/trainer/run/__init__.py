"""A run as processes and files: its engine and signals, its checkpoints and what it writes."""
