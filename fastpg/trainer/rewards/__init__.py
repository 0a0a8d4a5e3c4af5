"""What completions earn: reward functions, reward models and their training."""
