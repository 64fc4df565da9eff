"""``fusewire doctor``: what this kernel offers, which of its ways fusewire takes, and why not a better one."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from fusewire import kernel, paths
from fusewire.arguments import EXIT_FAILED, EXIT_OK
from fusewire.kernel import Facts

FORMAT = 1      # of the JSON; grows when a key changes its meaning or goes, not when one comes


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="tell what this kernel offers, and what fusewire makes of it",
        description="Tell what this kernel offers for file systems in user space, which way fusewire takes, and why "
        "not a better one.  Nothing is mounted and nothing is changed.",
        epilog="Exit code: 0 if this user can mount here, 32 if not.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; an exit code of mount(8)."""
    facts = kernel.probe()
    print(json.dumps(as_json(facts), indent=2) if args.json else as_text(facts))
    return EXIT_FAILED if paths.can_mount(facts) else EXIT_OK


def as_json(facts: Facts) -> dict[str, Any]:
    """The findings with stable keys; null is "cannot be known here"."""
    problem = paths.can_mount(facts)
    return {
        "format": FORMAT,
        "can_mount": not problem,
        "problem": problem or None,
        "kernel": {"release": facts.release, "machine": facts.machine},
        "protocol": {
            "major": 7,
            "minor": facts.protocol_minor,
            "source": facts.protocol_from.name.lower(),
            "init_flags": facts.init_flags,
        },
        "device": {"usable": not facts.device_problem, "problem": facts.device_problem or None},
        "filesystems": {"fuse": facts.has_fuse, "fuseblk": facts.has_fuseblk},
        "sync_init": facts.sync_init,
        "io_uring": {"parameter": facts.io_uring_parameter, "offered": facts.io_uring_offered},
        "passthrough": facts.passthrough,
        "iomap": {
            "present": None if facts.device_problem else facts.has_iomap,
            "allowed": None if facts.device_problem else facts.may_iomap,
            "flags": facts.iomap_support,
            "parameter": facts.iomap_parameter,
        },
        "limits": {
            "max_pages": facts.max_pages_limit,
            "default_request_timeout_s": facts.default_request_timeout_s,
            "max_request_timeout_s": facts.max_request_timeout_s,
        },
        "user": {
            "route": facts.route.name.lower(),
            "fusermount3": facts.fusermount or None,
            "fusermount3_setuid": facts.fusermount_is_setuid,
            "user_allow_other": facts.user_allow_other,
            "user_namespaces": facts.user_namespaces,
        },
        "loop": {"usable": not facts.loop_problem, "problem": facts.loop_problem or None},
        "fusectl_mounted": facts.fusectl,
        "paths": [
            {"topic": path.topic, "taken": path.taken, "best": path.best, "why_not": path.why_not or None}
            for path in paths.choose(facts)
        ],
    }


def as_text(facts: Facts) -> str:
    """The findings for people."""
    lines = ["What this kernel offers"]
    lines += [f"  {name:<20} {value}" for name, value in _offers(facts)]
    lines += ["", "What fusewire makes of it"]
    for path in paths.choose(facts):
        lines.append(f"  {'+' if path.is_best else '-'} {path.taken}")
        if path.why_not:
            lines += [f"      better: {path.best}", f"      not so, because {path.why_not}"]
    problem = paths.can_mount(facts)
    lines += ["", f"Mounting is not possible: {problem}" if problem else f"Mounts are made {facts.route.value}."]
    return "\n".join(lines)


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]


def _offers(facts: Facts) -> Iterator[tuple[str, str]]:
    """(what, how it is) of each finding."""
    minor = "unknown" if facts.protocol_minor is None else f"7.{facts.protocol_minor}"
    yield "kernel", f"{facts.release} {facts.machine}"
    yield "FUSE protocol", f"{minor} ({facts.protocol_from.value})"
    yield "/dev/fuse", facts.device_problem or "usable"
    yield "fuseblk", _yes(facts.has_fuseblk)
    yield "mount waits (6.18)", _yes(facts.sync_init)
    yield "io_uring (6.14)", _io_uring(facts)
    yield "passthrough (6.9)", f"{_yes(facts.passthrough)} (for files on other file systems; of no use to ext4)"
    yield "iomap", _iomap(facts)
    yield "longest request", f"{facts.max_pages_limit} pages"
    yield "request timeout", _timeout(facts)
    yield "fusermount3", _helper(facts)
    yield "user_allow_other", _yes(facts.user_allow_other)
    yield "user namespaces", _yes(facts.user_namespaces)
    yield "loop devices", facts.loop_problem or "usable"


def _io_uring(facts: Facts) -> str:
    if facts.io_uring_parameter is None:
        return "no"
    return "yes, switched on" if facts.io_uring_parameter else "yes, switched off (fuse.enable_uring)"


def _iomap(facts: Facts) -> str:
    if facts.device_problem:
        return "unknown"
    if not facts.has_iomap:
        return "no"
    return "yes, allowed" if facts.may_iomap else "yes, not allowed to this process"


def _timeout(facts: Facts) -> str:
    default, most = facts.default_request_timeout_s, facts.max_request_timeout_s
    if not default and not most:
        return "none"
    return f"{default or most} s: the kernel cuts the mount off when an answer takes longer"


def _helper(facts: Facts) -> str:
    if not facts.fusermount:
        return "not installed (package fuse3)"
    return facts.fusermount + ("" if facts.fusermount_is_setuid else ", but not set-user-ID root")
