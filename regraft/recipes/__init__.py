"""Whole experiments: the schema of a recipe, its phases run resumably, the demo."""
