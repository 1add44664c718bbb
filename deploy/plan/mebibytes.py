"""Sizes as a memory plan says them."""

MIB = 1024 * 1024


def mib(num_bytes: int) -> str:
    """Rounded up."""
    return f"{-(-num_bytes // MIB):,} MiB"
