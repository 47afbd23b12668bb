"""One table per model family; the file is named after the `model_type` of the config."""
