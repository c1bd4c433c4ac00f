"""Pages about runs, and comparisons of them, made from what the runs have stored."""
