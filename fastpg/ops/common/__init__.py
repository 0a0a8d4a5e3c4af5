"""What the ops of several chapters share."""
