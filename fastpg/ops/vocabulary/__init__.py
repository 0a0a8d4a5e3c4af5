"""Log-probs of tokens, from logits or from hidden states. These ops know nothing of RL."""
