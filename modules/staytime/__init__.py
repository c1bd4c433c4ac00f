"""Staytime models: base losses, comment losses, backbones and networks."""
