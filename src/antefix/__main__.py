"""`python -m antefix`, for launchers that take a module: the command `antefix`."""

from antefix.cli import main

main()
