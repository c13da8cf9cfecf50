"""Recipes that come along: `fewstep distill --recipe NAME`."""
