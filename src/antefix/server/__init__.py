"""Many requests, each with its own prefix, served by one base."""
