"""Fixtures for tests that mount: images made once per session, and a mount namespace that cleans up after itself.

A test that cannot run here says what is missing; in CI (environment variable ``CI``) that is a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

from tests import mounting  # noqa: E402 - the checkout must be on the path first
from tests.images import RECIPES, make_cached  # noqa: E402


def require(lacking: list[str]) -> None:
    """Skip the test that needs what is ``lacking``, or fail it in CI."""
    if not lacking:
        return
    message = "needs " + ", ".join(lacking)
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def mounts() -> None:
    """This process may mount, in a mount namespace of its own."""
    require(mounting.missing_requirements())
    mounting.private_mounts()


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that holds the images made so far."""
    folder = tmp_path_factory.mktemp("images")
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture(scope="session")
def image_of(mounts: None, image_cache: Path) -> Callable[[str], Path]:
    """A function from the name of a recipe to its image, made when first asked for."""

    def image(name: str) -> Path:
        recipe = RECIPES[name]
        require(recipe.missing())
        return make_cached(recipe, image_cache)

    return image
