"""Former path of vit.data.in_memory. Importing from here still works in this version, but not in the next.

`cut` is the former name of `split_images`.
"""

from vit.data.in_memory import Images, InMemory  # noqa: F401
from vit.data.in_memory import split_images as cut  # noqa: F401
