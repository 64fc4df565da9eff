"""Power cuts all over a recorded workload, each recovered in three ways, and what every recovery must give.

    recording ─▶ Cuts.image ─▶ fusewire's replay ─▶ tree = one of the snapshots, not older than what was acknowledged
                             ├▶ e2fsck -fy        ─▶ replays, frees orphans, and finds nothing else
                             ├▶ e2fsck -E journal_only ─▶ the same blocks as our replay
                             └▶ the kernel's mount ─▶ the same tree; clean for e2fsck afterwards

Our replay looks at each cut; the others at a share, since they cost a process or a mount.
"""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from fusewire import batchwriter
from fusewire.ext4 import checksum, journalfile, layout, orphan, recovery
from fusewire.ext4.features import Feature
from fusewire.ext4.filesystem import Options
from fusewire.ext4.journalsuper import JournalSuperblock
from tests.crash.bases import BASES, base
from tests.crash.machine import Machine
from tests.crash.model import Snapshot, Tree, difference, nodes_of_image, tree_of_image, tree_of_mount
from tests.crash.protocol import Protocol
from tests.crash.recorder import Cuts, Fate, Recorder
from tests.crash.workload import Workload
from tests.ext4.driver import ENVIRONMENT, Core
from tests.mounting import kernel_mount

MEMORY = Path("/dev/shm")
OPERATIONS = (60, 150, 400)
SECOND_LIVES = 0.4      # of the recordings go on after a crash
FULL_LOG = 1 << 20      # a share so small that the log is used up before a checkpoint, as under constant load
FINISHED = 0.3          # of the recordings end with the file system being put away
FATES = list(Fate)
_INCOMPAT = layout.SUPERBLOCK.offsets["feature_incompat"]
# What e2fsck may say of an image that only needs its journal and its orphans: all else is damage.
_HARMLESS = re.compile(
    r"e2fsck \d.*|.*: recovering journal|Clearing orphaned inode .*|Truncating orphaned inode .*|Pass \d.*|"
    r".*: \*+ FILE SYSTEM WAS MODIFIED \*+|.*: \d+/\d+ files .*|Setting free (inodes|blocks) count to .*|\s*")


class Cut(NamedTuple):
    """Where the power goes, and what becomes of what was on its way; ``chance`` seeds that."""

    at: int
    fate: Fate
    chance: str


class Recording:
    """One workload that was run to a point, what it was told, and what the files were at each batch.

    ``again``: it goes on where a crash of another one left the files, with what that one left in the log.
    """

    def __init__(self, name: str, seed: int, again: bool | None = None) -> None:
        self.name, self.seed = name, seed
        chance = random.Random(f"{name}:{seed}")
        image, root, place = base(name), None, self._place(chance)
        if chance.random() < SECOND_LIVES if again is None else again:
            image, place = _crashed(name, seed, chance), (None, None)
            root = nodes_of_image(image)
        self.recorder = Recorder(image)
        self.machine = machine = Machine(self.recorder, *place, chance.choice((None, None, 40)),
                                         chance.random() < 0.5)
        self.workload = Workload(machine, chance, root)
        first = Snapshot(self.workload.root)
        leisure, share = (0.05, batchwriter.CHECKPOINT_SHARE) if chance.random() < 0.5 else (0.0, FULL_LOG)
        machine.start()
        try:
            with patch.object(batchwriter, "CHECKPOINT_SHARE", share):
                self.workload.run(chance.choice(OPERATIONS), chance.choice((0.02, 0.08, 0.3)), leisure)
                if chance.random() < FINISHED or not machine.closed:
                    self.workload.finish()
        finally:
            machine.stop()
        self.snapshots: dict[int, tuple[Snapshot, int]] = {0: (first, 0), **machine.closed}
        self.journal = set(self._journal_blocks())
        if machine.log is not None:
            protocol = Protocol(machine.log, machine.fs.geometry.block_bytes)
            protocol.follow(self.recorder.events, self.workload.data_events)

    def _place(self, chance: random.Random) -> tuple[int | None, int | None]:
        """Where the log begins, and with which number: near the ends of the ring and of the numbers, too."""
        if not BASES[self.name].journal:
            return None, None
        return chance.choice((None, 1000, 1020, chance.randrange(1, 1024))), chance.choice((None, 0xFFFFFFFA, 5))

    def _journal_blocks(self) -> Iterator[int]:
        log = self.machine.log
        for extent in log.file.extents if log is not None else ():
            yield from range(extent.start, extent.start + extent.length)

    def cuts(self, count: int) -> list[Cut]:
        """All flush boundaries, and as many cuts between them as ``count`` leaves, in order."""
        chance = random.Random(f"cuts:{self.name}:{self.seed}")
        flushes = Cuts(self.recorder).flushes
        end = len(self.recorder.events)
        found = {Cut(flush + after, Fate.ALL, "") for flush in flushes for after in (0, 1)}
        if len(found) > count:
            found = set(chance.sample(sorted(found, key=lambda cut: cut.at), count))
        borders = [0, *(flush + 1 for flush in flushes), end]
        while len(found) < count:
            index = chance.randrange(len(borders) - 1)
            at = chance.randint(borders[index], borders[index + 1])
            found.add(Cut(at, chance.choice(FATES), f"{self.name}:{self.seed}:{len(found)}"))
        return sorted(found, key=lambda cut: (cut.at, cut.fate.name, cut.chance))

    def acknowledged(self, at: int) -> int:
        """The newest batch that somebody was told is durable."""
        return max((answer.batch for answer in self.machine.answers if answer.at <= at and answer.failure is None),
                   default=0)

    def closed(self, at: int) -> int:
        """The newest batch that was closed."""
        return max((number for number, (_, events) in self.snapshots.items() if events <= at), default=0)


def _crashed(name: str, seed: int, chance: random.Random) -> bytes:
    """The image of another recording, cut somewhere and repaired by e2fsck, which leaves the log as it is."""
    recording = Recording(name, ~seed, again=False)
    image = Cuts(recording.recorder).image(chance.randrange(len(recording.recorder.events)), Fate.SUBSET, chance)
    if Recovered(image).is_beyond_e2fsck:
        return base(name)
    with image_file(image) as path:
        examine(path)
        return path.read_bytes()


class Recovered:
    """A cut image after the replay of its log: what ``fusewire.ext4.recovery`` says, written home."""

    def __init__(self, image: bytearray) -> None:
        core = Core(image, Options(noload=True))
        self.image, self.block_bytes = bytearray(image), core.block_bytes
        if not core.fs.superblock.needs_recovery:
            return
        file = core.run(journalfile.locate)
        assert file is not None

        def read(journal_block: int) -> bytes:
            return core.pread(file.place(journal_block) * core.block_bytes, core.block_bytes)

        journal = JournalSuperblock.parse(read(0), core.block_bytes, file.blocks)
        for block, data in recovery.recover(journal, file, core.fs.geometry, read).blocks():
            self.image[block * core.block_bytes:(block + 1) * core.block_bytes] = data
        clear_needs_recovery(self.image)

    @property
    def has_orphans(self) -> bool:
        """Whether there is more to do than the replay."""
        return bool(Core(self.image).run(orphan.numbers))

    @property
    def is_beyond_e2fsck(self) -> bool:
        """Whether a file that is being cut has an attribute block: e2fsck 1.47.0 takes that from it, and then finds
        that the file's blocks are miscounted."""
        core = Core(self.image)
        cut = [core.inode(number) for number in core.run(orphan.numbers)]
        return any(found.links and found.file_acl for found in cut)

    def masked(self, journal: set[int], image: bytearray | None = None) -> bytes:
        """The image without what differs from one recovery to the other: the log and the superblock."""
        data = bytearray(self.image if image is None else image)
        size = self.block_bytes
        for block in journal:
            data[block * size:(block + 1) * size] = bytes(size)
        data[1024:2048] = bytes(1024)
        return bytes(data)


def clear_needs_recovery(image: bytearray) -> None:
    """What a mount does to the superblock in the end."""
    raw = image[1024:2048]
    incompat = int.from_bytes(raw[_INCOMPAT:_INCOMPAT + 4], "little") & ~Feature.RECOVER.mask
    raw[_INCOMPAT:_INCOMPAT + 4] = incompat.to_bytes(4, "little")
    checksum.seal_superblock(raw)
    image[1024:2048] = raw


class Sweep:
    """Checks cuts of one recording; ``shares`` of them also by e2fsck (twice) and by the kernel."""

    def __init__(self, recording: Recording, fsck: float = 0.1, compare: float = 0.05, kernel: float = 0.0) -> None:
        self.recording, self.shares = recording, (fsck, compare, kernel)
        self.states: dict[bytes, Tree] = {}
        self.checked = {"ours": 0, "e2fsck": 0, "journal_only": 0, "kernel": 0}
        self.chance = random.Random(f"shares:{recording.name}:{recording.seed}")

    def run(self, count: int) -> None:
        """Check so many cuts; AssertionError names the first that fails, and how to repeat it."""
        cuts = Cuts(self.recording.recorder)
        for cut in self.recording.cuts(count):
            image = cuts.image(cut.at, cut.fate, random.Random(cut.chance))
            try:
                self.check(cut, image)
            except Exception as error:
                where = f"{self.recording.name} seed {self.recording.seed} {cut}"
                path = Path(tempfile.gettempdir()) / "fusewire-crash-failed.img"
                path.write_bytes(image)
                raise AssertionError(f"{where}, image in {path}: {type(error).__name__}: {error}") from error

    def check(self, cut: Cut, image: bytearray) -> None:
        """One cut, in all ways that its turn has come for."""
        recovered = Recovered(image)
        self.checked["ours"] += 1
        tree = self.tree_of(recovered)
        number = self.matching(tree, cut)
        fsck, compare, kernel = (self.chance.random() < share for share in self.shares)
        if fsck and recovered.is_beyond_e2fsck:
            fsck, kernel = False, self.shares[2] > 0
        if fsck:
            self.checked["e2fsck"] += 1
            with image_file(image) as path:
                examine(path)
        if compare and not recovered.has_orphans:
            self.checked["journal_only"] += 1
            self.compare(recovered, image)
        if kernel:
            self.checked["kernel"] += 1
            self.by_kernel(image, cut, number)

    def tree_of(self, recovered: Recovered) -> Tree:
        """The tree, read once for each state."""
        key = hashlib.blake2b(recovered.masked(self.recording.journal)).digest()
        if key not in self.states:
            self.states[key] = tree_of_image(recovered.image)
        return self.states[key]

    def matching(self, tree: Tree, cut: Cut) -> int:
        """The number of the batch after which the files were so; it is not older than what was acknowledged."""
        recording, complaints = self.recording, []
        for number in range(recording.acknowledged(cut.at), recording.closed(cut.at) + 1):
            snapshot, since = recording.snapshots[number]
            wrong = difference(snapshot, tree, since, cut.at)
            if wrong is None:
                return number
            complaints.append(f"  not as after batch {number}: {wrong}")
        raise AssertionError("\n".join(["no snapshot matches", *complaints]))

    def compare(self, recovered: Recovered, image: bytearray) -> None:
        """e2fsck's replay gives the same blocks (if there are no orphans, which it would go on to free)."""
        with image_file(image) as path:
            done = e2fsck("-y", "-E", "journal_only", path)
            assert done.returncode in (0, 1), done.stdout + done.stderr
            theirs = bytearray(path.read_bytes())
        ours, others = (recovered.masked(self.recording.journal, data) for data in (recovered.image, theirs))
        if ours != others:
            size = recovered.block_bytes
            wrong = [at // size for at in range(0, len(ours), size) if ours[at:at + size] != others[at:at + size]]
            raise AssertionError(f"our replay and that of e2fsck differ in blocks {wrong[:20]}")

    def by_kernel(self, image: bytearray, cut: Cut, number: int) -> None:
        """The kernel's replay gives the same tree, and a clean file system."""
        with image_file(image) as path:
            with kernel_mount(path, "rw,noatime") as mounted:
                tree = tree_of_mount(mounted.root)
            snapshot, since = self.recording.snapshots[number]
            wrong = difference(snapshot, tree, since, cut.at)
            assert wrong is None, f"the kernel's replay: {wrong}"
            examine(path)


@contextmanager
def image_file(image: bytes | bytearray) -> Iterator[Path]:
    """The image as a file, in memory where that is possible."""
    with tempfile.NamedTemporaryFile(prefix="fusewire-crash-", dir=MEMORY if MEMORY.is_dir() else None) as file:
        file.write(image)
        file.flush()
        yield Path(file.name)


def e2fsck(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["e2fsck", *map(str, arguments)], capture_output=True, text=True, errors="replace",
                          env=ENVIRONMENT, check=False)


def examine(path: Path) -> None:
    """e2fsck replays the journal and frees orphans, finds nothing else wrong, and nothing at all the second time."""
    done = e2fsck("-fy", path)
    odd = [text for text in done.stdout.splitlines() if not _HARMLESS.fullmatch(text)]
    assert done.returncode in (0, 1) and not odd, f"e2fsck {done.returncode}: {odd}"
    again = e2fsck("-fn", path)
    assert again.returncode == 0, again.stdout
