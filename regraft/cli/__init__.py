"""The `regraft` command: one file a verb; `main` parses, calls one of them, prints, sets the exit
code.
"""
