"""What access control lists do to file modes: IEEE 1003.1e draft 17, 23.1.5 and acl(5).

An ACL here is a list of (tag, permissions, id) entries, as ``acl.entries`` gives it.
"""

from .acl import GROUP_OBJ, MASK, OTHER, USER_OBJ, Entries
from .errors import Check, Corrupt

_OWNER_BITS, _GROUP_BITS = 6, 3


def equivalent_mode(entries: Entries) -> int | None:
    """The nine permission bits that say the same as a minimal ACL; None if the ACL says more than bits can.

    Raises ``Corrupt(ACL_FORMAT)`` for one that says less.
    """
    by_tag = {tag: permissions for tag, permissions, _ in entries}
    if set(by_tag) - {USER_OBJ, GROUP_OBJ, OTHER}:
        return None
    if len(by_tag) < len((USER_OBJ, GROUP_OBJ, OTHER)):
        raise Corrupt(Check.ACL_FORMAT, tags=sorted(by_tag))
    return by_tag[USER_OBJ] << _OWNER_BITS | by_tag[GROUP_OBJ] << _GROUP_BITS | by_tag[OTHER]


def mode_with(entries: Entries, mode: int) -> int:
    """A file's mode once it has this access ACL: the group bits show the mask, or the owning group without one."""
    by_tag = {tag: permissions for tag, permissions, _ in entries}
    group = by_tag.get(MASK, by_tag[GROUP_OBJ])
    return mode & ~0o777 | by_tag[USER_OBJ] << _OWNER_BITS | group << _GROUP_BITS | by_tag[OTHER]


def inherited(default: Entries, mode: int) -> tuple[Entries, int]:
    """(access ACL, mode) of a new file in a directory with a default ACL; ``mode`` is what its creator asked for."""
    has_mask = any(tag == MASK for tag, _, _ in default)
    result, bits = [], mode & 0o777
    for tag, permissions, owner in default:
        shift = {USER_OBJ: _OWNER_BITS, OTHER: 0, MASK: _GROUP_BITS}.get(tag)
        if tag == GROUP_OBJ and not has_mask:
            shift = _GROUP_BITS
        if shift is not None:
            permissions &= bits >> shift & 7  # noqa: PLW2901 - the rule is about this value
            bits = bits & ~(7 << shift) | permissions << shift
        result.append((tag, permissions, owner))
    return result, mode & ~0o777 | bits


def with_mode(entries: Entries, mode: int) -> Entries:
    """An access ACL after chmod(2): owner, other, and mask (or owning group) take the new bits."""
    has_mask = any(tag == MASK for tag, _, _ in entries)
    shifts = {USER_OBJ: _OWNER_BITS, OTHER: 0, MASK if has_mask else GROUP_OBJ: _GROUP_BITS}
    return [(tag, mode >> shifts[tag] & 7 if tag in shifts else permissions, owner)
            for tag, permissions, owner in entries]
