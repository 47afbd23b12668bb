"""Training text and images: files read as a stream, tokenised once into a cache, rows by number."""
