"""Steps: one file each, `Checkpoint -> Checkpoint`."""
