"""Models of several parts: where their language model lies, and what writes into its stream."""
