"""Former path of common.nn.patches. Importing from here still works in this version, but not in the next."""

from common.nn.patches import Form, Patches, lecun_normal_  # noqa: F401
