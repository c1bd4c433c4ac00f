"""What is learnt: one file per question."""
