"""The ingested measurement: its store, and how it gets there."""
