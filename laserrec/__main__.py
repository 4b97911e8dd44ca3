"""`python -m laserrec`: the command line."""

from laserrec.cli.main import main

main()
