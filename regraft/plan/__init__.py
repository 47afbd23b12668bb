"""What a change or a training run would cost, before any weight is read."""
