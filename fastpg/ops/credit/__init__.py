"""Who gets the credit: rewards, advantages and baselines."""
