"""`python -m mimoquant`."""

from mimoquant.cli.app import main

main()
