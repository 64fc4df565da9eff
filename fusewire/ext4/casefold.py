"""Names as casefolded directories compare and hash them: Unicode 12.1, NFD, full case folding, ignorables removed.

Which characters that changes is fixed by the version, 12.1; how it changes them is the same in every later version, by
Unicode's stability policies, so Python's own tables say it.  All other characters stay as they are and end a run of
combining marks, those that later versions assigned among them.
Source: kernel documentation, ext4, "Case-insensitive file name lookups"; Unicode 12.1, UAX #15 and chapter 3.13.
"""

import re
import unicodedata

# Code points above ASCII that 12.1 decomposes, folds or gives a combining class; a range also covers what lies between
# two of them if 12.1 assigned all of it.
_ACTIVE = """
    B5-34E 350-376 37E-37F 385-38A 38C 38E-3A1 3A3-52E 531-556 587 591-5C7 610-61A 622-6ED 711-74A 7EB-7F3
    7FD-82D 859-85B 8D3-95F 9BC 9CB-9CD 9DC-9DD 9DF 9FE A33 A36 A3C A4D A59-A5B A5E ABC ACD B3C B48 B4B-B4D
    B5C-B5D B94 BCA-BCD C48 C4D C55-C56 CBC-CC0 CC7-CC8 CCA-CCD D3B-D3C D4A-D4D DCA DDA-DDE E38-E3A E48-E4B
    EB8-EBA EC8-ECB F18-F43 F4D-F69 F71-F93 F9D-FB9 FC6 1026-10C5 10C7 10CD 135D-135F 13F8-13FD 1714 1734
    17D2-17DD 18A9 1939-193B 1A17-1A18 1A60-1A7C 1A7F 1AB0-1ABD 1B06-1B44 1B6B-1B73 1BAA-1BF3 1C37 1C80-1C88
    1C90-1CBA 1CBD-1CBF 1CD0-1CF9 1DC0-1DF9 1DFB-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
    1F5F-1F7D 1F80-1FB4 1FB6-1FC4 1FC6-1FD3 1FD6-1FDB 1FDD-1FEF 1FF2-1FF4 1FF6-1FFD 2000-2001 20D0-20F0
    2126-2183 219A-232A 24B6-2ADC 2C00-2C2E 2C60-2CF2 2D7F 2DE0-2DFF 302A-302F 304C-3094 3099-30FE A640-A6F1
    A722-A7BE A7C2-A7C6 A806 A8C4 A8E0-A953 A9B3-A9C0 AAB0-AAC1 AAF6 AB70-ABED AC00-D7A3 F900-FA6D FA70-FAD9
    FB00-FB06 FB13-FB17 FB1D-FB36 FB38-FB3C FB3E FB40-FB41 FB43-FB44 FB46-FB4E FE20-FE2F FF21-FF3A 101FD 102E0
    10376-1037A 10400-10427 104B0-104D3 10A0D-10A0F 10A38-10A3A 10A3F 10AE5-10AE6 10C80-10CB2 10D24-10D27
    10F46-10F50 11046 1107F-110BA 11100-11134 11173 111C0-111CA 11235-11236 112E9-112EA 1133B-1133C 1134B-1134D
    11366-1136C 11370-11374 11442-11446 1145E 114BB-114C3 115BA-115C0 1163F 116B6-116B7 1172B 11839-1183A
    118A0-118BF 119E0 11A34-11A47 11A99 11C3F 11D42-11D45 11D97 16AF0-16AF4 16B30-16B36 16E40-16E5F 1BC9E
    1D15E-1D172 1D17B-1D1C0 1D242-1D244 1E000-1E006 1E008-1E018 1E01B-1E021 1E023-1E024 1E026-1E02A 1E130-1E136
    1E2EC-1E2EF 1E8D0-1E8D6 1E900-1E94A 2F800-2FA1D
"""
# Default_Ignorable_Code_Point of 12.1.  They end a run of combining marks before they vanish.
_IGNORABLE = """
    AD 34F 61C 115F-1160 17B4-17B5 180B-180E 200B-200F 202A-202E 2060-206F 3164 FE00-FE0F FEFF FFA0 FFF0-FFF8
    1BCA0-1BCA3 1D173-1D17A E0000-E0FFF
"""


def _pattern(ranges: str) -> re.Pattern[str]:
    """One or more characters of these ranges, which are hexadecimal."""
    pairs = [(text.partition("-")[0], text.rpartition("-")[2]) for text in ranges.split()]
    return re.compile("[" + "".join(f"{chr(int(low, 16))}-{chr(int(high, 16))}" for low, high in pairs) + "]+")


_ACTIVE_RUN, _IGNORABLE_RUN = _pattern(_ACTIVE), _pattern(_IGNORABLE)
_STRAY, _BROKEN = re.compile("[\udc80-\udcbf]"), re.compile("[\udcc0-\udcff]")


def _fold_run(run: re.Match[str]) -> str:
    return _fold_active(run[0])


def _fold_active(text: str) -> str:
    return unicodedata.normalize("NFD", text.casefold())


def fold(name: bytes) -> bytes | None:
    """What a casefolded directory hashes and compares instead of ``name``; None if it is not UTF-8.

    A name that is not UTF-8 hashes and compares as its own bytes, and a file system with strict encoding
    (``encoding_flags`` bit 0) refuses it with EINVAL.  Stray continuation bytes (0x80–0xBF) do not count as malformed
    here: see ``_fold_around_strays``.  The result may be longer than a name may be, and empty.
    """
    name = name.lower()  # of bytes: A–Z only
    if name.isascii():
        return name
    try:
        return _IGNORABLE_RUN.sub("", _ACTIVE_RUN.sub(_fold_run, name.decode())).encode()
    except UnicodeDecodeError:
        return _fold_malformed(name)


def _fold_malformed(name: bytes) -> bytes | None:
    text = name.decode(errors="surrogateescape")  # a malformed byte \xNN becomes \udcNN
    return None if _BROKEN.search(text) else _fold_around_strays(text).encode(errors="surrogateescape")


def _fold_around_strays(text: str) -> str:
    """The folded text where some characters are stray continuation bytes.

    Kernel and e2fsprogs take such a byte for more of the character before it, so it passes, and where marks are put in
    order around it, it comes out whenever it is passed: once while the marks are looked through, and once more for
    each combining class among them.  Hashes on disk depend on this.
    """
    done: list[str] = []
    run: list[str] = []
    for character in text:
        active = _ACTIVE_RUN.match(character) is not None
        for part in _fold_active(character) if active else [_IGNORABLE_RUN.sub("", character)]:
            if (active and unicodedata.combining(part)) or (run and _STRAY.match(part)):
                run.append(part)
            else:
                done += [*_ordered(run), part]
                run = []
    return "".join(done + _ordered(run))


def _ordered(run: list[str]) -> list[str]:
    """Marks, of which the first in ``run`` is one, by combining class; stray bytes among them as said above."""
    classes = sorted({unicodedata.combining(part) for part in run} - {0})
    passes = [[part for part in run if unicodedata.combining(part) in (0, each)] for each in classes]
    return [part for part in run if not unicodedata.combining(part)] + [part for each in passes for part in each]


def hashed_form(name: bytes) -> bytes:
    """What the directory hash of a name in a casefolded directory is taken of."""
    folded = fold(name)
    return name if folded is None else folded


def same_name(one: bytes, other: bytes) -> bool:
    """Whether a casefolded directory takes two names for the same."""
    if one == other:
        return True
    folded = fold(one)
    return folded is not None and folded == fold(other)
