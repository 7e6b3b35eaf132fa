"""Measuring preference models."""
