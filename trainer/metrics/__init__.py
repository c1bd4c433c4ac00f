"""AUC and its kin; metrics of seconds."""
