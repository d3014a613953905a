"""Recipes are TOML files, complete by themselves; this package only carries them."""
