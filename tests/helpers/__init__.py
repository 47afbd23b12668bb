"""What several tests share: tiny models, the command line in this process, torchrun, kills."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
