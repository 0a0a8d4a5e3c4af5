"""From scored rollouts to optimiser steps."""
