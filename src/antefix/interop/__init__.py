"""Other libraries' files, read as prefixes. Knows their files, needs none of them installed."""
