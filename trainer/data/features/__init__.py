"""Features: fitted statistics, id maps, histories and the packed inputs of a model."""
