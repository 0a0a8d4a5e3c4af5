"""`fastpg bench`: fastpg against plain PyTorch, torch.compile and other packages, on this machine.

problem.py     a calculation on given inputs, who can do it, and how right they are
baselines.py   the lines people write
peers.py       other packages, each in a few lines, or the reason why it is left out
problems.py    the problems: log-probs, linear head, GAE, losses
suites.py      which of them a suite times, at which sizes
accuracy.py, scaling.py, torture.py, step.py   suites that ask something else
timing.py, running.py   every candidate in turn, and a row for each
report.py, plots.py     rows as a table, as sentences, as CSV, as pictures
"""
