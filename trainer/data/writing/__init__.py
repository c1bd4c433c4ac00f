"""Writing: builds a dataset on disk from visits, tables and texts."""
