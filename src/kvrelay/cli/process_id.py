"""What is a process called that was not given a name?"""

from __future__ import annotations

import secrets
import socket


def own_id(role: str) -> str:
    """Role, host and random characters: two processes never share one, not even a restarted one and its predecessor."""
    return f"{role}-{socket.gethostname().partition('.')[0]}-{secrets.token_hex(2)}"
