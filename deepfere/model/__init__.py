"""The method: registration, mapping and fusion, on torch and NumPy alone."""
