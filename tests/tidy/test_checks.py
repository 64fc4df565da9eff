"""Every rule that a disk can break is raised somewhere and proven by a test that names it."""

from pathlib import Path

import pytest

from fusewire.ext4.errors import Check

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "\n".join(path.read_text() for path in (ROOT / "fusewire").rglob("*.py") if path.name != "errors.py")
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_checks.py")


@pytest.mark.parametrize("check", Check, ids=lambda check: check.name)
def test_every_check_is_raised_and_tested(check: Check) -> None:
    assert f"Check.{check.name}" in SOURCE, "nothing raises it"
    assert f"Check.{check.name}" in TESTS or f'"{check.name}"' in TESTS, "no test names it"
