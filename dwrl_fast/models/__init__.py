"""Hugging Face models as preference models: loaded, placed, tried, adapted and saved."""
