"""ioctl numbers and records against the installed headers, and the calls against this kernel's devices."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fusewire import ioctl

HEADERS = ("linux/fs.h", "linux/loop.h", "linux/fuse.h", "linux/fscrypt.h", "linux/fsverity.h", "linux/fiemap.h")
OPTIONAL_HEADERS = ("linux/ext4.h",)    # from Linux 6.1 on, not everywhere installed
PREFIXES = ("FUSE_DEV_IOC_", "BLK", "LOOP_", "LO_FLAGS_", "FI", "FS_IOC", "EXT4_IOC_")
RECORDS = {
    "struct loop_config": ioctl.LOOP_CONFIG_BYTES,
    "struct loop_info64": ioctl.LOOP_INFO64.size,
    "struct fsxattr": ioctl.FSXATTR.size,
    "struct fstrim_range": ioctl.FSTRIM_RANGE.size,
}
# What the headers of Debian 12 have of ours; newer ones have more, which are compared too.
LEAST_COMPARED = 60


def numbers() -> dict[str, int]:
    """Every number of the module that a header might have."""
    return {
        name: value for name, value in vars(ioctl).items()
        if name.startswith(PREFIXES) and isinstance(value, int) and name not in ("LOOP_CONFIG_BYTES",)
    }


def compiled(tmp_path: Path, body: str) -> str:
    """What a C program with these statements prints."""
    headers = [*HEADERS, *(name for name in OPTIONAL_HEADERS if Path("/usr/include", name).exists())]
    source = tmp_path / "values.c"
    includes = "".join(f"#include <{name}>\n" for name in ("stdio.h", "stddef.h", "stdint.h", "sys/ioctl.h", *headers))
    source.write_text(f"{includes}int main(void) {{\n{body}\nreturn 0; }}\n")
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "needs a C compiler (Debian package gcc)"
    subprocess.run([compiler, "-o", tmp_path / "values", source], check=True)
    return subprocess.run([tmp_path / "values"], check=True, capture_output=True, text=True).stdout


def test_numbers_are_those_of_the_headers(tmp_path: Path) -> None:
    show = {name: f'printf("{name} %llu\\n", (unsigned long long)(unsigned)({name}));\n' for name in numbers()}
    enums = "".join(text for name, text in show.items() if "LO_FLAGS" in name)
    macros = "".join(f"#ifdef {name}\n{text}#endif\n" for name, text in show.items() if "LO_FLAGS" not in name)
    header = {line.split()[0]: int(line.split()[1]) for line in compiled(tmp_path, enums + macros).splitlines()}
    assert {name: hex(value) for name, value in header.items()} == {
        name: hex(value) for name, value in numbers().items() if name in header
    }
    assert len(header) >= LEAST_COMPARED
    assert {"FUSE_DEV_IOC_CLONE", "LOOP_CONFIGURE", "BLKGETSIZE64", "FS_IOC_FSGETXATTR", "FITRIM"} <= set(header)


def test_records_have_the_sizes_and_places_of_the_headers(tmp_path: Path) -> None:
    statements = "".join(f'printf("%zu\\n", sizeof({name}));\n' for name in RECORDS)
    places = ("lo_offset", "lo_sizelimit", "lo_number", "lo_flags", "lo_file_name", "lo_init")
    statements += "".join(f'printf("%zu\\n", offsetof(struct loop_info64, {name}));\n' for name in places)
    found = [int(line) for line in compiled(tmp_path, statements).split()]
    assert found[: len(RECORDS)] == list(RECORDS.values())
    assert found[len(RECORDS) :] == [24, 32, 40, 52, 56, 216]


def test_numbers_of_the_reference() -> None:
    """fuse-iomap.md 1.4 has the values that no installed header has."""
    assert [
        ioctl.FUSE_DEV_IOC_CLONE, ioctl.FUSE_DEV_IOC_BACKING_OPEN, ioctl.FUSE_DEV_IOC_BACKING_CLOSE,
        ioctl.FUSE_DEV_IOC_SYNC_INIT, ioctl.FUSE_DEV_IOC_IOMAP_SUPPORT, ioctl.FUSE_DEV_IOC_SET_NOFS,
        ioctl.FUSE_DEV_IOC_ADD_IOMAP, ioctl.FUSE_DEV_IOC_ADD_IOMAP_G6, ioctl.FUSE_DEV_IOC_IOMAP_SET_BLOCKSIZE,
        ioctl.FUSE_DEV_IOC_IOMAP_SET_BLOCKSIZE_G6, ioctl.FUSE_DEV_IOC_IOMAP_STRIPE_CONFIG,
    ] == [
        0x8004E500, 0x4010E501, 0x4004E502, 0xE503, 0x8010E563, 0x4004E564, 0xE565, 0xE563, 0x4008E566, 0x4008E563,
        0x4010E567,
    ]
    assert ioctl.size_of(ioctl.FS_IOC_FSGETXATTR) == 28
    assert ioctl.FS_IOC_GETFSUUID == 0x80111500
    assert ioctl.EXT4_IOC_GETFSUUID == 0x8008662C


def test_a_fresh_fuse_device(mounts: None) -> None:
    """Vanilla kernels know nothing of iomap: absence is an answer, not an error."""
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        support = ioctl.iomap_support(fd)
        if support is None:
            assert ioctl.add_iomap(fd) is False
            assert ioctl.set_nofs(fd) is False
            assert ioctl.iomap_set_blocksize(fd, 1, 4096) is False
        calls = (lambda: ioctl.backing_open(fd, fd), lambda: ioctl.backing_close(fd, 1), lambda: ioctl.clone(fd, 0))
        for call in calls:
            with pytest.raises(OSError) as raised:
                call()
            assert raised.value.errno in (errno.EPERM, errno.EINVAL)
        assert ioctl.sync_init(fd) is (release >= (6, 18))
    finally:
        os.close(fd)


def test_block_device_calls(tmp_path: Path, mounts: None) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"\xaa" * (4 << 20))
    command = ["losetup", "-f", "--show", "-b", "4096", image]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    fd = os.open(device, os.O_RDWR)
    try:
        assert ioctl.device_bytes(fd) == 4 << 20
        assert (ioctl.logical_sector_bytes(fd), ioctl.physical_sector_bytes(fd)) == (4096, 4096)
        assert not ioctl.is_read_only(fd)
        rotational = Path(f"/sys/block/{Path(device).name}/queue/rotational").read_text().strip()
        assert ioctl.is_rotational(fd) is (rotational == "1")
        ioctl.set_soft_block_bytes(fd, 4096)
        assert ioctl.soft_block_bytes(fd) == 4096
        with pytest.raises(OSError):
            ioctl.set_soft_block_bytes(fd, 3000)
        sequence = ioctl.disk_sequence(fd)
        assert sequence is None or sequence > 0
        ioctl.zero_out(fd, 8192, 4096)
        ioctl.discard(fd, 1 << 20, 8192)
        ioctl.flush_buffers(fd)
        assert os.pread(fd, 4096, 8192) == bytes(4096)
        assert os.pread(fd, 4096, 4096) == os.pread(fd, 4096, 12288) == b"\xaa" * 4096
        with image.open("ab") as file:
            file.truncate(8 << 20)
        ioctl.loop_set_capacity(fd)
        assert ioctl.device_bytes(fd) == 8 << 20
    finally:
        os.close(fd)
        subprocess.run(["losetup", "-d", device], check=True)


def test_requests_of_a_mounted_file_system(tmp_path: Path, mounts: None) -> None:
    """Freeze, thaw and trim, with the kernel's ext4 as the other side."""
    image, target = tmp_path / "fs", tmp_path / "mnt"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    target.mkdir()
    subprocess.run(["mount", "-o", "loop", image, target], check=True)
    try:
        fd = os.open(target, os.O_RDONLY)
        try:
            ioctl.freeze(fd)
            with pytest.raises(OSError) as raised:
                ioctl.freeze(fd)
            assert raised.value.errno == errno.EBUSY
            ioctl.thaw(fd)
            assert 1 << 20 < ioctl.trim(fd) <= 16 << 20
        finally:
            os.close(fd)
    finally:
        subprocess.run(["umount", target], check=True)
