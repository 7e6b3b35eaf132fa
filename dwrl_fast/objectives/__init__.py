"""Pure functions of scores and log-probs: what is minimised, with nothing of models, batches or loops in them."""
