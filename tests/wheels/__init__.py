"""What is installed, in clean environments: `make test-wheels`."""
