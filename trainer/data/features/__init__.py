"""From stored rows to model inputs."""
