"""Texts for a person: errors, log, progress, tables, exit statuses."""
