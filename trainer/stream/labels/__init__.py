"""Label assembly: turns the events of visits into training rows under a report policy."""
