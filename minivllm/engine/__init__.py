"""Decides what runs.  Knows no tensors: nothing in this package imports torch."""
