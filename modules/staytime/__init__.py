"""Staytime bases, losses, networks, backbones."""
