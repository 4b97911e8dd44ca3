"""`python -m laserrec`: the command line."""

from laserrec.cli.entry import main

main()
