"""Prefect's server, for requests to the names it is known by alone.

A page whose own name was made to lead here (DNS rebinding) asks for that name, and gets no answer. Prefect has no
setting for it. This file needs Prefect alone: ``deploy/several-hosts/compose.yaml`` runs it in Prefect's own image.
"""

from __future__ import annotations

import os
from typing import Any

#: Names and addresses, comma-separated, that requests may be for, whatever the port.
HOSTS = "LORASUITE_ALLOWED_HOSTS"


def application() -> Any:
    """The ASGI application: Prefect's, behind a check of the header ``Host``.

    Raises:
        KeyError: if no names are given.
    """
    from prefect.server.api.server import create_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = [name.strip() for name in os.environ[HOSTS].split(",") if name.strip()]
    # around the application and not in it, where the server's own services call it under a name of their own
    return TrustedHostMiddleware(create_app(final=True), allowed_hosts=names, www_redirect=False)
