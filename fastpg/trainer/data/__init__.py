"""What a run reads: datasets, and the tokens of their prompts."""
