"""The losses, as pure functions of scores and log-probabilities, independent of models, batches and training loops."""
