"""Tiles: planned purely, then carried out on Ray Data."""
