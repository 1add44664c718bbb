"""Keeps the lines that gRPC's C core logs off a user's terminal and out of daemons' logs: an error
reaches its caller as a status anyway.

Import it before grpc, which reads the variable once. A user who sets GRPC_VERBOSITY gets the lines.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
