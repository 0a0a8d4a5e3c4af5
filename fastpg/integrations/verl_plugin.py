"""What verl imports in each of its processes: the entry point of the group `verl.plugins`."""

from .verl import patch_on_import

patch_on_import()
