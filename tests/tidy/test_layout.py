"""The rules about the shape of the code: which way imports point, how long files and functions are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fusewire"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_uapi.py")
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "bench").rglob("*.py"))

# A module imports only from rows below its own.  docs/architecture.md draws the same picture.
LAYERS = (
    ("cli.*",),
    ("daemon",),
    ("source",),
    ("server", "uevents"),
    ("reporter",),
    ("ops",),
    ("handlers.*", "onerror"),
    ("filewrite",),
    ("fetcher", "writable"),
    ("waiting", "workers"),
    ("fileio", "committer", "settler", "replayed"),
    ("batchwriter",),
    ("session",),
    ("wirelog",),
    ("wire", "wire.*"),
    ("uapi", "uapi_build"),
    ("uapi_text",),
    ("uapi_iomap",),
    ("paths",),
    ("kernel", "unmount"),
    ("mount",),
    ("fusermount", "remount", "runtime", "sourcelock", "partition", "bdi"),
    ("blockdev", "loopdev", "mountapi", "mountrequest", "mountinfo"),
    ("arguments", "options", "ioctl"),
    ("accel", "log"),
    ("accel_build",),
    ("ext4", "ext4.*"),
    ("__init__",),
)
EXT4_MAY_IMPORT = {"crc32c"}
ASYNC_MODULES = {"server", "daemon", "uevents"}
MOST_FILE_LINES = 600
MOST_FUNCTION_LINES = 70


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def layer_of(module: str) -> int:
    for number, row in enumerate(LAYERS):
        for pattern in row:
            if module == pattern or (pattern.endswith(".*") and f"{module}.".startswith(pattern[:-1])):
                return number
    raise AssertionError(f"{module} has no place in the picture: add it to LAYERS and docs/architecture.md")


def imports_of(path: Path) -> set[str]:
    """Names of all modules that a file imports, relative ones resolved; those for type checkers left out."""
    tree = ast.parse(path.read_text())
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If)
               and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" for inner in ast.walk(node)}
    package = ["fusewire", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            full = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                candidate = PACKAGE.parent / full.replace(".", "/") / f"{alias.name}.py"
                is_package = (PACKAGE.parent / full.replace(".", "/") / alias.name).is_dir()
                found.add(f"{full}.{alias.name}" if candidate.exists() or is_package else full)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    own = module_of(path)
    for name in imports_of(path):
        if not name.startswith("fusewire.") or name in ("fusewire._uapi", "fusewire._accel"):
            continue
        target = name.removeprefix("fusewire.")
        same_package = own.split(".")[0] == target.split(".")[0]
        assert same_package or layer_of(target) > layer_of(own), f"{own} imports {target}, which is not below it"


@pytest.mark.parametrize("path", [path for path in SOURCES if "ext4" in path.parts], ids=module_of)
def test_ext4_imports_nothing_from_outside(path: Path) -> None:
    import sys  # noqa: PLC0415

    for name in imports_of(path):
        top = name.split(".")[0]
        assert name.startswith("fusewire.ext4") or top in sys.stdlib_module_names or top in EXT4_MAY_IMPORT, name
        assert top not in ("asyncio", "threading", "socket", "subprocess", "fcntl", "mmap"), name


def test_ext4_modules_do_not_import_in_a_circle() -> None:
    graph = {module_of(path): {name.removeprefix("fusewire.") for name in imports_of(path)}
             for path in SOURCES if "ext4" in path.parts}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail, module))
        if module not in done:
            for below in graph.get(module, set()) - {"ext4"}:
                visit(below, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_asyncio_appears_only_where_waiting_happens(path: Path) -> None:
    uses = any(name.split(".")[0] in ("asyncio", "uvloop") for name in imports_of(path))
    assert not uses or module_of(path).split(".")[0] in ASYNC_MODULES | {"service"}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_FILE_LINES, f"{path} has outgrown its subject"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_public_things_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.stat().st_size == 0, f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


def test_only_loop_and_journal_catch_everything() -> None:
    """The loop, where a bug must cost one request only, and the journal's thread, where it must abort the journal."""
    places = [f"{module_of(path)}:{node.lineno}" for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.ExceptHandler)
              and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception",
                                                                                             "BaseException")))]
    assert {place.split(":")[0] for place in places} <= {"server", "committer", "batchwriter"}, places
