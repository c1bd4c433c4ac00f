"""What it costs: one file per question."""
