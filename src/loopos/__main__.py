"""`python -m loopos`: the command line without its script."""

from __future__ import annotations

from loopos.cli.app import main

if __name__ == "__main__":
    main()
