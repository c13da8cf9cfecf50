"""Datasets: sources of raw rows, their preparation to shards, and the stream that training reads."""
