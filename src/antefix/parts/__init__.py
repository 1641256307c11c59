"""Learned pieces that several methods share. Each is a module; none knows which method uses it."""
