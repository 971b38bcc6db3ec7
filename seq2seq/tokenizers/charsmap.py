"""Check SentencePiece's compiled map of characters; the library `tokenizers` would panic on a malformed map.

A map is a 4-byte little-endian length, a trie of this length, and the replacements as UTF-8, each ended by a zero. The
trie is a double array of 4-byte units (the library Darts-clone). In a unit, bit 31 marks a leaf, whose other bits are
the byte offset of a replacement. In other units, bits 10 to 30 are the offset of the children; it is multiplied by 256
if bit 9 is set. The child for byte b of the unit with index i has the index i xor offset xor b. Bit 8 is set if a key
ends at the unit; the child for byte 0 is then a leaf.
"""

import numpy as np


def mistake(charsmap: bytes) -> str | None:
    """Say why a map is unsafe, such as "its replacements are not valid UTF-8"; None if it is safe.

    All units of the trie are checked, also those that no key reaches.
    """
    length = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 + length or length % 4 or not length:
        return f"its trie has {max(len(charsmap) - 4, 0):,} of {length:,} bytes"
    units = np.frombuffer(charsmap, "<u4", length // 4, 4).astype(np.int64)
    replacements = np.frombuffer(charsmap, np.uint8, offset=4 + length)
    try:
        charsmap[4 + length :].decode()
    except UnicodeDecodeError:
        return "its replacements are not valid UTF-8"
    offsets = (units >> 10) << ((units >> 6) & 8)
    children = np.arange(len(units)) ^ offsets  # for byte 0; for other bytes, they are in the same block of 256 units
    inner = units >> 31 == 0
    if (children[inner] | 255 >= len(units)).any():
        return "its trie refers to units beyond its end"
    indices = units[children[inner & ((units >> 8) & 1 == 1)]] & 0x7FFFFFFF
    if (indices >= len(replacements)).any() or (replacements[indices] & 0xC0 == 0x80).any():
        return "its trie refers to places that are not the start of a replacement"
    return None
