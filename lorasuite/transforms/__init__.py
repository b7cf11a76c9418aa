"""Updates moved from the old base to the new one. One module a transform.

What the room offers is listed in ``__init__.pyi``; names are imported when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
