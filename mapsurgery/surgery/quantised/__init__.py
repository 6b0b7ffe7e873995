"""Layers with a quantised weight: how they are read and written, adapted and merged."""
