"""``python -m cutaway``: the command line."""

from cutaway.cli import main

raise SystemExit(main())
