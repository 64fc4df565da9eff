"""Encrypted directories as one sees them without the key: presented names, symbolic link targets, contexts.

A name on disk is ciphertext, any bytes but at least 16 of them.  It is presented as unpadded base64url of

    dirhash   2 × u32 LE   (major, minor) of the ciphertext, see below
    bytes     ≤ 149        the ciphertext, or its start where it is longer
    sha256    32           of the ciphertext after those 149 bytes; only where it is longer

so that a presented name is at most 252 characters and can be looked up: by its ciphertext, or where that is cut short,
by the hash that leads into the hash tree, by its start and by the SHA-256 of its rest.

The pair ``dirhash`` is the directory hash (``dirhash.dirhash``, with the superblock's seed and the version that the
tree's root names, or the superblock where there is no tree) of the ciphertext if the kernel reads the directory in
hash order: the file system has dir_index, and the directory has a hash tree or is a single block.  It is (0, 0) where
the directory is read in the order of its blocks: a directory of several blocks without a hash tree, or a file system
without dir_index.  Directories that are casefolded as well keep the pair in their entries, after the name.  A lookup
does not compare the pair; in a hash tree it leads to the leaf of a name that is cut short, which is not found under
another pair.  Anything that is not a presented name is ENOENT.

Source: kernel documentation, filesystems/fscrypt, "Encryption context", "Filenames encryption"; the presentation itself
was read off the kernel's (6.18) listings, which ``tests/ext4/test_fscrypt.py`` compares.
"""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, replace
from struct import Struct

from .errors import Check, Corrupt

CONTEXT_XATTR_INDEX, CONTEXT_XATTR_NAME = 9, b"c"

_HASHES = Struct("<II")
_START_BYTES, _DIGEST_BYTES = 149, 32
_CUT_SHORT_BYTES = _HASHES.size + _START_BYTES + _DIGEST_BYTES
_CIPHERTEXT_BYTES_MIN = 16
_PRESENTED_MAX = 252
_ALPHABET = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


# ---- names -----------------------------------------------------------------------------------------------------

def in_hash_order(has_dir_index: bool, has_tree: bool, blocks: int) -> bool:
    """Whether the names of an encrypted directory of ``blocks`` blocks are presented with their hashes, not (0, 0)."""
    return has_dir_index and (has_tree or blocks == 1)


def present_name(ciphertext: bytes, hashes: tuple[int, int]) -> bytes:
    """The name shown for the entry ``ciphertext`` (never "." or "..", which are not encrypted).

    ``hashes`` is the directory hash of the ciphertext, or (0, 0): see the module's text for when.
    """
    if len(ciphertext) < _CIPHERTEXT_BYTES_MIN:
        raise Corrupt(Check.DIRENT_NAME, encrypted_name_bytes=len(ciphertext))
    shown = _HASHES.pack(*hashes) + ciphertext[:_START_BYTES]
    if len(ciphertext) > _START_BYTES:
        shown += hashlib.sha256(ciphertext[_START_BYTES:]).digest()
    return urlsafe_b64encode(shown).rstrip(b"=")


@dataclass(frozen=True, slots=True)
class PresentedName:
    """What a presented name says about the entry it stands for.

    ``ciphertext`` is the whole name on disk, or its first 149 bytes where ``digest`` is the SHA-256 of the rest.
    ``hashes`` leads to it in a hash tree; where ``whole``, hash ``ciphertext`` instead, the pair may be (0, 0).
    """

    hashes: tuple[int, int]
    ciphertext: bytes
    digest: bytes

    @property
    def whole(self) -> bool:
        """Whether ``ciphertext`` is the complete name on disk."""
        return not self.digest

    def matches(self, name: bytes) -> bool:
        """Whether this stands for the name ``name`` on disk."""
        if self.whole:
            return name == self.ciphertext
        return (len(name) > _START_BYTES and name[:_START_BYTES] == self.ciphertext
                and hashlib.sha256(name[_START_BYTES:]).digest() == self.digest)


def parse_name(presented: bytes) -> PresentedName | None:
    """What a name given to a lookup stands for, or None: not a presented name, so no such entry (ENOENT).

    Less than 16 bytes of ciphertext is none either.  (The kernel does look for them, and stumbles over the entry ".".)
    """
    raw = _decode(presented)
    if raw is None or len(raw) < _HASHES.size + _CIPHERTEXT_BYTES_MIN:
        return None
    start = raw[_HASHES.size:_HASHES.size + _START_BYTES]
    digest = raw[_HASHES.size + _START_BYTES:]
    if digest and len(raw) != _CUT_SHORT_BYTES:
        return None
    major, minor = _HASHES.unpack_from(raw)
    return PresentedName((major, minor), start, digest)


def _decode(presented: bytes) -> bytes | None:
    """The bytes of unpadded base64url whose unused last bits are 0, or None; one "A" too many counts as such bits."""
    if len(presented) > _PRESENTED_MAX or not _ALPHABET.issuperset(presented):
        return None
    if len(presented) % 4 == 1:
        presented, surplus = presented[:-1], presented[-1:]
        if surplus != b"A":
            return None
    raw = urlsafe_b64decode(presented + b"=" * (-len(presented) % 4))
    return raw if urlsafe_b64encode(raw).rstrip(b"=") == presented else None


# ---- symbolic links --------------------------------------------------------------------------------------------

_LENGTH = Struct("<H")


def symlink_target(raw: bytes) -> bytes:
    """The target shown for an encrypted symbolic link, presented like a name with the pair (0, 0).

    ``raw`` is all there may be of it: the 60 bytes of the inode's block array, or the link's first block.  It starts
    with the length of the ciphertext.  ``st_size`` of such a link is the length of this target, not the inode's size.
    """
    if len(raw) <= _LENGTH.size:
        raise Corrupt(Check.SYMLINK_SIZE, encrypted_bytes=len(raw))
    length = _LENGTH.unpack_from(raw)[0]
    if length < _CIPHERTEXT_BYTES_MIN or _LENGTH.size + length > len(raw):
        raise Corrupt(Check.SYMLINK_SIZE, encrypted_bytes=length, room_bytes=len(raw) - _LENGTH.size)
    return present_name(bytes(raw[_LENGTH.size:_LENGTH.size + length]), (0, 0))


# ---- the encryption context --------------------------------------------------------------------------------------

_CONTEXT_BYTES = {1: 28, 2: 40}


@dataclass(frozen=True, slots=True)
class Context:
    """How an inode is encrypted: extended attribute "c" of index 9.

    ``contents_mode`` and ``filenames_mode`` number the ciphers, ``key`` names the master key (descriptor of 8 bytes in
    version 1, identifier of 16 in version 2), ``nonce`` makes the inode's own key.  ``data_unit_bits`` is 0 for the
    file system's block size.
    """

    version: int
    contents_mode: int
    filenames_mode: int
    flags: int
    data_unit_bits: int
    key: bytes
    nonce: bytes

    @property
    def padding_bytes(self) -> int:
        """What names are padded to a multiple of before they are encrypted: 4, 8, 16 or 32."""
        return 4 << (self.flags & 3)


def parse_context(value: bytes) -> Context:
    """The context that an inode's attribute holds; Corrupt where version and size are not those of one.

    The kernel lists and looks up names below a directory whose context it cannot parse, as if its key were missing;
    where the attribute itself is missing, both are ENODATA.
    """
    version = value[0] if value else 0
    if _CONTEXT_BYTES.get(version) != len(value):
        raise Corrupt(Check.ENCRYPTION_CONTEXT, version=version, size_bytes=len(value))
    _, contents, names, flags = value[:4]
    if version == 1:
        return Context(version, contents, names, flags, 0, value[4:12], value[12:28])
    return Context(version, contents, names, flags, value[4], value[8:24], value[24:40])


def permitted(directory: Context | None, child: Context | None) -> bool:
    """Whether an encrypted directory may hold a directory or symbolic link with this context; else lookup is EPERM.

    None stands for no context (the child is not encrypted) or one that cannot be parsed.  Other file types are not
    checked before they are opened.
    """
    if directory is None or child is None:
        return False
    return replace(directory, nonce=b"") == replace(child, nonce=b"")
