"""Ways to grow or linearize a model against training from scratch, on equal budgets and data."""
