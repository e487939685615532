"""`python -m kvrelay.cli` is the `kvrelay` command."""

from kvrelay.cli import main

main()
