"""Check the compiled character map of a SentencePiece model. The package `tokenizers` panics on a malformed map.

The map tells which characters normalisation replaces, and by which text. It consists of the trie's length in bytes (4
bytes, little-endian), the trie, and the replacements in UTF-8, each terminated by a zero byte. The trie is a double
array of 4-byte units, as in the library Darts-clone. Bit 31 of a unit marks a leaf. The other bits of a leaf are the
byte offset of its replacement. In any other unit, bits 10 to 30 are the offset of its children, to be multiplied by 256
if bit 9 is set. The child of unit i for byte b has the index (i xor offset xor b). Bit 8 of a unit is set if a key ends
there. The unit's child for byte 0 is then a leaf.
"""

import numpy as np


def mistake(charsmap: bytes) -> str | None:
    """Return the reason why a map is unsafe, such as "its replacements are not valid UTF-8", or None if it is safe.

    All units of the trie are checked, including units that no key reaches.
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
    children = np.arange(len(units)) ^ offsets  # for byte 0; other bytes have children in the same block of 256 units
    inner = units >> 31 == 0
    if (children[inner] | 255 >= len(units)).any():
        return "its trie refers to units beyond its end"
    indices = units[children[inner & ((units >> 8) & 1 == 1)]] & 0x7FFFFFFF
    if (indices >= len(replacements)).any() or (replacements[indices] & 0xC0 == 0x80).any():
        return "its trie refers to places that are not the start of a replacement"
    return None
