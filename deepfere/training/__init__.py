"""Training of the fusion model and the record that is kept of it."""
