"""Whole experiments: the schema of a recipe, its phases carried out resumably, the demo."""
