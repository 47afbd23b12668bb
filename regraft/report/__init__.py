"""What a person reads: the HTML page, its plots, tables in the terminal."""
