"""One table per model family, found by its file name: the `model_type` of the config."""
