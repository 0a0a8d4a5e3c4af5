"""`python -m fastpg` is the `fastpg` command."""

from fastpg.cli import main

raise SystemExit(main())
