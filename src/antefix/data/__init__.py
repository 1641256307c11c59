"""From files to examples, from examples to batches. Knows nothing of prefixes."""
