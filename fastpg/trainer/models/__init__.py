"""The policy, its reference and its critic: from files, and from completions to log-probs."""
