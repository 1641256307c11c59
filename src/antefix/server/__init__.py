"""Many requests, each with its own prefix, served by one base."""

from importlib.metadata import version

VERSION = version("antefix")
