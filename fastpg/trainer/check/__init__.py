"""`fastpg train --check`: a rollout and a minibatch, looked at by other means than training's."""
