"""Measuring students: features, metrics, pictures, and the acceptance criteria."""
