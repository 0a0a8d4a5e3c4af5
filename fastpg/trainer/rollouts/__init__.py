"""Completions: sampled by the policy or another engine, or handed in by a loop of your own."""
