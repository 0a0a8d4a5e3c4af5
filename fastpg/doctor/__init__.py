"""`fastpg doctor`: what is installed, and why a rollout engine and a trainer disagree."""
