"""Grids of `fewstep ablate`, as YAML files."""
