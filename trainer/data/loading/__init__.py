"""Loading: batches of training rows in an exact order that can be restored."""
