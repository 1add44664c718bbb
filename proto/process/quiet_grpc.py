"""Keeps the lines that gRPC's C core logs off a user's terminal and out of daemons' logs: an error
reaches its caller as a status anyway.

Imported before grpc, which looks once. Whoever sets GRPC_VERBOSITY has asked for them.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
