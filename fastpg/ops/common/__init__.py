"""Code that the ops of several chapters share."""
