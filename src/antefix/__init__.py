"""Antefix: train, measure, keep and serve prefixes over a frozen language model."""
