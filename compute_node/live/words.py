"""What figures are called on a page or a terminal: the field's terms, in plain English."""

from __future__ import annotations

STALL_CAUSES = {
    "not_foreseen": "for experts that nobody had guessed",
    "too_late": "for guessed ones that were not read yet",
    "disk_busy": "while the disk read something else",
    "message": "for the store's answer",
    "no_decode": "in prompts",
}
POLICIES = {
    "actual": "this node",
    "min": "optimum (MIN)",
    "lru": "least recently used",
    "lfu": "least frequently used",
    "lfru": "frequency, then recency",
    "decayed": "decayed frequency",
    "importance": "router importance",
    "river": "learned online",
    "learned": "calibrated ahead",
}
MEMORY_PARTS = {
    "segment": "expert slots",
    "dense_weights": "dense weights",
    "compute_node": "node",
    "expert_store": "store",
    "scheduler": "scheduler",
    "launcher": "launcher",
    "valkey": "Valkey",
    "gateway": "gateway",
}
DAEMONS = {"compute_node": "node", "expert_store": "store", "scheduler": "scheduler"}


def called(words: dict[str, str], name: str) -> str:
    """A name that is new here stands for itself."""
    return words.get(name, name.replace("_", " "))


def reason(why: str) -> str:
    """Why a policy is in charge, as the end of a sentence: the scheduler says `led lru of late`."""
    if why == "configured":
        return "it is configured"
    return f"it {why}" if why.startswith("led ") else why
