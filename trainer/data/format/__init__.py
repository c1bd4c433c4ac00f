"""Files of a dataset: schemas, readers, and the structures that the readers share."""
