"""A measurement as one HTML page: what each model changed, where, and how the changes lie to each other.

The page is one file without scripts, fonts or anything else from a network, and says so to the browser
(Content-Security-Policy). Names come from strangers' checkpoints: :mod:`.elements` escapes all of them.
"""

from .document import measurement_page
from .files import check_page_path, save_page

__all__ = ["check_page_path", "measurement_page", "save_page"]
