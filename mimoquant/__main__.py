"""`python -m mimoquant`."""

from mimoquant.cli import main

main()
