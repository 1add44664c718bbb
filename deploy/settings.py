"""flashmoe.toml as the launcher reads it: its own [serve] table, and overrides for each
daemon's.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
)

from expert_store.manifest.sizing import Sizing
from proto import errors
from proto.quality import EXACT_NAME, QUALITY_NAME
from proto.redis_schema import PolicySetting
from proto.rpc import TlsFiles


def _default_run_dir() -> Path:
    """The folder in the user's home. Without a home `~` stays, and `RunDir.prepare` refuses it."""
    path = Path("~/.flashmoe/run")
    try:
        return path.expanduser()
    except RuntimeError:
        return path


DEFAULT_RUN_DIR = _default_run_dir()
DEFAULT_LISTEN = "127.0.0.1:9400"
_LOCAL_FILE = Path("flashmoe.toml")
_BYTES = TypeAdapter(ByteSize)
_CALIBRATED = ("forecaster_path", "router_map_path")  # what daemons' tables call it
_TUNED = ("quality_path", "quality")

Role = Literal["main", "worker", "shadow"]
"""What a box does. worker: compute experts for another; shadow: name experts for another."""


class ServeSettings(BaseModel):
    """How one box is served. A flag wins over the file, the file over these defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = None
    memory: str | None = None
    experts_memory: str | None = None
    kv_memory: str | None = None
    run_dir: Path = DEFAULT_RUN_DIR
    redis: str | None = None
    source: Path | None = None
    policy: PolicySetting = "auto"
    quality: str = EXACT_NAME
    http: str | None = None
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    shadow_address: str | None = None
    listen: str = DEFAULT_LISTEN
    lend: str | None = None
    store: str | None = None
    expert_store: dict[str, Any] = Field(default_factory=dict)
    compute_node: dict[str, Any] = Field(default_factory=dict)
    scheduler: dict[str, Any] = Field(default_factory=dict)
    gateway: dict[str, Any] = Field(default_factory=dict)
    worker: dict[str, Any] = Field(default_factory=dict)
    shadow: dict[str, Any] = Field(default_factory=dict)
    _is_calibrated: bool = PrivateAttr(default=True)
    _is_tuned: bool = PrivateAttr(default=True)
    _role: Role = PrivateAttr(default="main")

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Read `path`, or ./flashmoe.toml if there is one. Raises ConfigInvalid naming file and
        key.
        """
        path = path or (_LOCAL_FILE if _LOCAL_FILE.exists() else None)
        if path is None:
            return cls()
        try:
            return cls.of(tomllib.loads(path.read_text()))
        except ValidationError as error:
            raise errors.ConfigInvalid.of(str(path), error) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise errors.ConfigInvalid(f"cannot read {path}: {error}") from error

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """As a file has them. Raises ValidationError."""
        tables = {name: table for name, table in document.items() if name != "serve"}
        return cls.model_validate({**document.get("serve", {}), **tables})

    @property
    def role(self) -> Role:
        """What this box does."""
        return self._role

    def of_helper(self, role: Role) -> Self:
        """These settings, for a box that helps a main node on another."""
        left = self.model_copy(update={"http": None, "redis": None})
        left._role = role
        return left

    @property
    def lends_at(self) -> str | None:
        """Where other boxes borrow experts of this one's store. A shadow's are another checkpoint's
        to them.
        """
        return None if self._role == "shadow" else self.lend

    @property
    def lent_slots(self) -> int:
        """Slots for what is on its way to other boxes."""
        return self._count("expert_store", "lent_slots", 8) if self.lends_at is not None else 0

    @property
    def borrows_from(self) -> str | None:
        """Whose store a worker's experts come from; None: it has one."""
        return self.store if self._role == "worker" else None

    @property
    def store_tls(self) -> TlsFiles | None:
        """What a worker shows another box's store. Raises ConfigInvalid."""
        files = self.worker.get("store_tls")
        try:
            return None if files is None else TlsFiles.model_validate(files)
        except ValidationError as error:
            raise errors.ConfigInvalid.of("table [worker], store_tls", error) from error

    @property
    def store_deadline_s(self) -> float:
        """How long a worker waits for a store that is away. Raises ConfigInvalid."""
        value = self.worker.get("deadline_s", 30.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise errors.ConfigInvalid(f"table [worker]: deadline_s is {value!r}: write seconds")
        return float(value)

    def borrowing(self, store: str | None, model: Path | None) -> Self:
        """These settings of a worker with its flags for a store: another box's, or one on this box.
        A flag leaves out what the file says of the other.

        Raises ConfigInvalid for both.
        """
        if (store is None) == (model is None):
            left = self.with_flags(store=store, model=model)
        else:
            left = self.model_copy(update={"store": store, "model": model})
        if left.store is not None and left.model is not None:
            raise errors.ConfigInvalid(
                f"--store {left.store} is another box's store, --model {left.model} is one on this "
                "box: give one of them"
            )
        return left

    @property
    def read_depth(self) -> int:
        return self._count("expert_store", "read_depth", 4)

    def spare_slots(self, slot_bytes: int) -> int:
        """Slots beside those of the plan, for reads under way and guesses that came: as many as the
        read depth, fewer where one expert is many reads, two at least.
        """
        piece_bytes = self._count("expert_store", "piece_bytes", 2 * 1024 * 1024)
        needed = -(-self.read_depth * piece_bytes // slot_bytes) + 1
        return self._count("expert_store", "spare_slots", max(2, min(self.read_depth, needed)))

    @property
    def context_tokens(self) -> int:
        return self._count("compute_node", "max_context_tokens", 2048)

    @property
    def kv_memory_bytes(self) -> int | None:
        """Raises ConfigInvalid."""
        return parse_bytes(self.kv_memory, "kv_memory") if self.kv_memory else None

    def chunk_tokens(self, sizing: Sizing) -> int:
        """Prompt tokens computed at once, fewer where attention holds a score for each pair of
        positions.
        """
        default = 256 if sizing.eager_attention_heads else 512
        return self._count("compute_node", "prefill_chunk_tokens", default)

    @property
    def half_life_tokens(self) -> Any:
        """Of the node's decayed policy, which the scheduler shadows; the daemons check it."""
        return self.compute_node.get("half_life_tokens", 16.0)

    @property
    def runs_importance(self) -> Any:
        """Whether nodes keep and send gates, so that the scheduler may choose importance; the
        daemons check it.
        """
        return self.compute_node.get("importance", False)

    def _count(self, table: str, key: str, default: int) -> int:
        """What the memory plan needs of a daemon's table. Raises ConfigInvalid."""
        value = getattr(self, table).get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise errors.ConfigInvalid(f"table [{table}]: {key} is {value!r}: write a count")
        return value

    def forecaster(self, store_dir: Path) -> Path | None:
        """What was calibrated for the store: the file that [scheduler] names, else the one beside
        the manifest. Raises ConfigInvalid when the file that is named is not there.
        """
        from scheduler.config import FORECASTER_NAME  # clients of a stack need none of it

        named, beside = self.scheduler.get("forecaster_path"), store_dir / FORECASTER_NAME
        return self._calibrated(named, beside, "forecaster", "flashmoe calibrate --out")

    def router_map(self, store_dir: Path) -> Path | None:
        """What was learned about the store's routers: the file that [compute_node] names, else the
        one beside the manifest. Raises ConfigInvalid when the file that is named is not there.
        """
        from compute_node.config import ROUTER_MAP_NAME  # clients of a stack need none of it

        named, beside = self.compute_node.get("router_map_path"), store_dir / ROUTER_MAP_NAME
        return self._calibrated(named, beside, "router map", "flashmoe calibrate")

    @property
    def default_quality(self) -> str:
        """Of requests that do not say one: a budget, or "exact". What [serve] or a flag says wins
        over the node's own table.
        """
        own = self.compute_node.get("quality", EXACT_NAME)
        return self.quality if self.quality != EXACT_NAME else str(own)

    def quality_card(self, store_dir: Path) -> Path | None:
        """What was measured of lossy routes: the file that [compute_node] names, else the one
        beside the manifest. Raises ConfigInvalid when the file that is named is not there.
        """
        if not self._is_tuned:
            return None
        named, beside = self.compute_node.get("quality_path"), store_dir / QUALITY_NAME
        return self._found(named, beside, "quality card", "flashmoe tune --out")

    def _calibrated(self, named: Any, beside: Path, what: str, command: str) -> Path | None:
        return self._found(named, beside, what, command) if self._is_calibrated else None

    def _found(self, named: Any, beside: Path, what: str, command: str) -> Path | None:
        """The file that is named, else the one beside the manifest if it is there. Raises
        ConfigInvalid when the file that is named is not, with the command that writes one.
        """
        path = Path(str(named or beside))
        if path.is_file():
            return path
        if named:
            raise errors.ConfigInvalid(f"{what} {path} is no file: name what `{command}` wrote")
        return None

    def with_forecaster(self, path: Path) -> Self:
        """These settings with what was calibrated outside the store: a forecaster, and the router
        map that `router_map_beside` names if there is one, else the store's.
        """
        named = {"forecaster_path": str(path.resolve())}
        beside, node = router_map_beside(path.resolve()), self.compute_node
        if beside.is_file() and "router_map_path" not in node:
            node = node | {"router_map_path": str(beside)}
        return self.model_copy(update={"scheduler": self.scheduler | named, "compute_node": node})

    def uncalibrated(self) -> Self:
        """These settings without what was calibrated, wherever it lies: for a stack that calibrates
        anew, which a damaged file must not keep from starting.
        """
        left = self._without(_CALIBRATED)
        left._is_calibrated = False
        return left

    def untuned(self) -> Self:
        """These settings without a quality card, wherever it lies, and exact by default: for a
        stack that measures anew, which a damaged card must not keep from starting.
        """
        left = self._without(_TUNED).model_copy(update={"quality": EXACT_NAME})
        left._is_tuned = False
        return left

    def _without(self, keys: Collection[str]) -> Self:
        tables = {"scheduler": self.scheduler, "compute_node": self.compute_node}
        return self.model_copy(
            update={
                name: {key: value for key, value in table.items() if key not in keys}
                for name, table in tables.items()
            }
        )

    def with_flags(self, **flags: Any) -> Self:
        """These settings, with every flag that was given."""
        given = {name: value for name, value in flags.items() if value is not None}
        left = self._without({"quality"}) if "quality" in given else self
        return left.model_copy(update=given)


def router_map_beside(forecaster: Path) -> Path:
    """The router map that is calibrated with a forecaster, and named after its file."""
    from compute_node.config import ROUTER_MAP_NAME
    from scheduler.config import FORECASTER_NAME

    if forecaster.name == FORECASTER_NAME:
        return forecaster.with_name(ROUTER_MAP_NAME)
    stem = forecaster.name.removesuffix(".safetensors")
    return forecaster.with_name(f"{stem}.{ROUTER_MAP_NAME}")


def parse_bytes(text: str, what: str) -> int:
    """`2GiB`, `512MB`, `1073741824`. Raises ConfigInvalid."""
    try:
        size_bytes = int(_BYTES.validate_python(text))
    except ValidationError:
        raise errors.ConfigInvalid(
            f"{what} {text!r} is not a size: write for example 2GiB"
        ) from None
    if 0 < size_bytes < 1024:
        raise errors.ConfigInvalid(f"{what} {text!r} is {size_bytes} bytes: is {text}GiB meant?")
    return size_bytes


def parse_experts_memory(text: str, num_experts: int, slot_bytes: int) -> int:
    """Bytes of whole slots from `96` (slots), `37.5%` (of all experts) or `2GiB`. Raises
    ConfigInvalid.
    """
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise errors.ConfigInvalid(f"experts memory {text!r} is not a share within 0 and 100 %")
        return round(share * num_experts) * slot_bytes
    if text.isdecimal():
        return int(text) * slot_bytes
    return parse_bytes(text, "experts memory") // slot_bytes * slot_bytes
