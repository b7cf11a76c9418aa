"""What of one base matches what of the other: hidden spaces, layers, heads, activations and states.

What the room offers is listed in ``__init__.pyi``; names are imported when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
