"""The report policies: time to react, ranking, calibration."""
