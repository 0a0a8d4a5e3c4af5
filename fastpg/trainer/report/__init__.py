"""What a run shows while it goes on, and says at its end."""
