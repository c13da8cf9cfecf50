"""What combines training, evaluation and registration: the only package that knows all three."""
