"""`python -m regraft` and the command `regraft`; Ctrl-C during imports gives no traceback."""

import sys


def main() -> int:
    """Run the command line of this process; the exit code."""
    try:
        from .cli.main import main as run_command
    except KeyboardInterrupt:
        return 130
    return run_command()


if __name__ == "__main__":
    sys.exit(main())
