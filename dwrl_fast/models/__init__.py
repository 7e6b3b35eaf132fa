"""Hugging Face models as preference models: loading, placement, trial, adapters and saving."""
