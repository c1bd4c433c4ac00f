"""What a person reads: errors, log, progress, tables, exit statuses."""
