"""What the files are, by the model; and by an image or a mount, in the same words."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fusewire.ext4 import namespace, xattr
from fusewire.ext4.inode import Inode
from fusewire.ext4.units import ROOT_INODE
from tests.ext4.driver import Core

PREFIX = b"user."


class State(NamedTuple):
    """One name as people see it: ``data`` is a file's content or a link's target."""

    mode: int
    links: int
    size: int
    xattrs: tuple[tuple[bytes, bytes], ...]
    data: bytes


Tree = dict[bytes, State]


@dataclass
class Node:
    """A file, directory or symbolic link of the model.

    ``versions``: every content that a file has had or was being given, with the number of device events before it.
    Nothing else may ever be read there: no zeroes from behind the end of a file that was cut in vain.
    """

    number: int
    mode: int
    links: int = 1
    data: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)
    versions: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def state(self) -> State:
        size = 0 if self.is_dir else len(self.data)
        return State(self.mode, self.links, size, tuple(sorted(self.xattrs.items())), self.data)


class Snapshot:
    """The whole model at one moment."""

    def __init__(self, root: Node) -> None:
        self.tree: Tree = {}
        self.nodes: dict[bytes, Node] = {}
        for path, node in walk(root):
            self.tree[path], self.nodes[path] = node.state(), node


def walk(node: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    """Every name below a directory."""
    for name, child in node.children.items():
        yield path + b"/" + name, child
        if child.is_dir:
            yield from walk(child, path + b"/" + name)


def difference(expected: Snapshot, found: Tree, since: int, upto: int) -> str | None:
    """How a recovered tree differs from a snapshot, None if it does not.

    Data that were written in place after the snapshot was taken (``since`` events), up to the cut (``upto``), may be
    there or not: they have no journal.
    """
    if expected.tree.keys() != found.keys():
        return f"lacks {sorted(expected.tree.keys() - found.keys())}, has {sorted(found.keys() - expected.tree.keys())}"
    for path, state in expected.tree.items():
        here = found[path]
        if state[:-1] != here[:-1]:
            return f"{path!r}: {state[:-1]} expected, found {here[:-1]}"
        if state.data != here.data:
            wrong = _foreign(here.data, [state.data, *_written(expected.nodes[path], since, upto)])
            if wrong is not None:
                return f"{path!r}: byte {wrong} of {len(here.data)} was never written there: " \
                       f"{here.data[wrong:wrong + 16]!r} instead of {state.data[wrong:wrong + 16]!r}"
    return None


def _written(node: Node, since: int, upto: int) -> list[bytes]:
    """What was written to a file in a span of events, and what was under way when it began."""
    before = [content for at, content in node.versions if at < since][-1:]
    return before + [content for at, content in node.versions if since <= at <= upto]


def _foreign(found: bytes, versions: list[bytes], step: int = 512) -> int | None:
    """The first byte that no version has in its place."""
    for start in range(0, len(found), step):
        piece = found[start:start + step]
        if any(version[start:start + step] == piece for version in versions):
            continue
        for index in range(start, start + len(piece)):
            if not any(version[index:index + 1] == found[index:index + 1] for version in versions):
                return index
    return None


# ---- from an image, by the core --------------------------------------------------------------------------------

def tree_of_image(image: bytes | bytearray) -> Tree:
    """The tree of an image; no name of it may be damaged."""
    core = Core(image)
    return {path: _state_of(core, found) for path, found in core.tree() if path != b"/lost+found"}


def nodes_of_image(image: bytes | bytearray) -> Node:
    """The root of a model that is what an image holds."""
    core = Core(image)
    root = Node(ROOT_INODE, stat.S_IFDIR | 0o755, 3)
    known, places = {int(ROOT_INODE): root}, {b"": root}
    for path, found in core.tree():
        if path == b"/lost+found":
            continue
        state = _state_of(core, found)
        node = known.get(found.number)
        if node is None:
            node = known[found.number] = Node(found.number, state.mode, state.links, state.data, dict(state.xattrs))
        parent, _, name = path.rpartition(b"/")
        places[parent].children[name] = places[path] = node
    return root


def _state_of(core: Core, found: Inode) -> State:
    names = core.run(xattr.names, found, True)
    values = tuple(sorted((name.removeprefix(PREFIX), core.run(xattr.get, found, name)) for name in names))
    if found.is_dir:
        return State(found.mode, found.links, 0, values, b"")
    data = core.run(namespace.readlink, found) if found.is_symlink else core.content(found) if found.is_regular else b""
    return State(found.mode, found.links, found.size, values, data)


# ---- from a mount ----------------------------------------------------------------------------------------------

def tree_of_mount(root: Path) -> Tree:
    """The tree of a mounted file system."""
    tree: Tree = {}
    top = os.fsencode(root)

    def visit(path: bytes) -> None:
        for name in os.listdir(top + path):
            below = path + b"/" + name
            if below == b"/lost+found":
                continue
            tree[below] = state_of_path(top + below)
            if stat.S_ISDIR(tree[below].mode):
                visit(below)

    visit(b"")
    return tree


def state_of_path(path: bytes) -> State:
    """What a name is."""
    status = os.lstat(path)
    names = os.listxattr(path, follow_symlinks=False)
    values = tuple(sorted((os.fsencode(name).removeprefix(PREFIX), os.getxattr(path, name, follow_symlinks=False))
                          for name in names))
    read: dict[int, Callable[[], bytes]] = {
        stat.S_IFLNK: lambda: os.readlink(path), stat.S_IFREG: lambda: _content(path)}
    data = read.get(stat.S_IFMT(status.st_mode), lambda: b"")()
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return State(status.st_mode, status.st_nlink, size, values, data)


def _content(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()
