"""From token ids to the tensors of a forward pass, and to losses; for training and for whatever else scores texts."""
