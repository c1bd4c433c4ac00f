"""From visits to a dataset on disk."""
