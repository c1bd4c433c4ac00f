"""A live stream: open visits, predictions, features, freshness."""
