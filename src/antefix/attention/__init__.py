"""Where a prefix meets the model: partial results, their merge, and the hook on transformers' attention."""
