"""Text on disk as rows of tokens: files read as a stream, tokenised once into a cache, rows read from it by number."""
