"""The losses as functions of tensors, and the bank that they compare with. Knows torch alone."""
