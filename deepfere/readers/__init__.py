"""Readers for what users bring: slides and mass spectrometry images."""
