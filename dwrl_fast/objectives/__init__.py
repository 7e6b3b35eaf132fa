"""The losses, as pure functions of scores and log-probabilities: they know nothing of models, batches or loops."""
