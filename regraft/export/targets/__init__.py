"""What a model can be exported as, one file each with a `target`."""
