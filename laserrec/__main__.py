"""`python -m laserrec`: the command line."""

from laserrec.cli import main

main()
