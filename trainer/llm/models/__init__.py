"""Base models, adapters, templates."""
