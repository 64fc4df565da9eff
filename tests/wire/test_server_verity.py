"""Verity files through the server: every byte that is handed out was checked, whatever part of a file is asked for."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.images import RECIPES
from tests.populate import pattern
from tests.wire.kernel_peer import Peer, served

BLOCK = 4096
SIZES = (1, 4095, 4097, 600_000, 3_000_000)
WORST_READ = 65536


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("verity"), {}
    for name in ("verity", "verity-corrupt"):
        require(RECIPES[name].missing())
        made[name] = folder / name
        RECIPES[name].make(made[name])
    return made


@pytest.fixture
def peer(images: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Peer]:
    with served(images[request.param]) as peer:
        peer.init()
        yield peer


@pytest.mark.parametrize("peer", ["verity"], indirect=True)
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("size", SIZES)
def test_any_part_can_be_read(peer: Peer, size: int, algorithm: str) -> None:
    name = f"{algorithm}-16-{size}"
    node, data = peer.lookup(name.encode()), pattern(name, size)
    rng = random.Random(size)
    places = [(0, WORST_READ), (size - 1, 10), (size, 10)]
    places += [(rng.randrange(size), rng.randrange(1, WORST_READ)) for _ in range(20)]
    for offset, length in places:
        assert peer.read(node, offset, length).body == data[offset : offset + length], (offset, length)


@pytest.mark.parametrize("peer", ["verity-corrupt"], indirect=True)
@pytest.mark.parametrize("size", SIZES)
def test_one_wrong_bit_costs_its_block(peer: Peer, size: int) -> None:
    name = f"sha256-0-{size}"
    node, data = peer.lookup(name.encode()), pattern(name, size)
    wrong = size // 2 // BLOCK * BLOCK
    assert peer.read(node, size // 2, 1).errno == errno.EIO
    assert peer.read(node, wrong, 1).errno == errno.EIO
    for block in {0, wrong - BLOCK, wrong + BLOCK} - {wrong}:
        if 0 <= block < size:
            assert peer.read(node, block, BLOCK).body == data[block : block + BLOCK]
    assert peer.is_alive()
