"""``limelight doctor``: checks of the installation and the machine, each with what to type if it fails."""
