"""The limelight command, one file per group of verbs, each importing its work only when asked."""
