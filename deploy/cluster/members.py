"""The boxes of a cluster over Ray: an actor each, in a placement group that lies on that box alone.

Which boxes there are, whether they live, and that an actor that ended is made again, is Ray's.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.cluster.box import AnyBox
from deploy.cluster.config import AUTO, ClusterConfig
from deploy.cluster.here import here
from deploy.cluster.keeper import Keeper
from deploy.cluster.order import Order
from proto import errors

NAMESPACE = "flashmoe"
_SHARE = 0.001  # of Ray's resource that a box has one of: several may lie on one
_CONNECT_S, _ANSWER_S, _START_S, _STOP_S = 30.0, 20.0, 600.0, 120.0
_NOTICE_S, _JOIN_S = 3.0, 60.0  # of a head that is there; of a box that is just starting
_POLL_S = 0.2

Say = Callable[[str], None]


@contextmanager
def connected(config: ClusterConfig) -> Iterator[Members]:
    """A driver of Ray on one of the boxes, for the block. Ray's environment is that of the process,
    and what Ray prints goes to stderr.

    Raises ConfigInvalid, Unavailable.
    """
    box = here(config)
    _check_head(config)
    try:
        ray.init(
            config.ray_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address=box.host,
        )
    except (ConnectionError, RayError, RuntimeError, TimeoutError, ValueError) as error:
        raise _away(config, error) from error
    try:
        with redirect_stdout(sys.stderr):
            yield Members(config)
    except GetTimeoutError as error:
        raise errors.Unavailable(f"Ray did not answer in time: {_short(error)}") from error
    finally:
        ray.shutdown()


def _check_head(config: ClusterConfig) -> None:
    """Ray itself takes minutes to find that nobody is there. Raises Unavailable."""
    if config.ray == AUTO:
        return
    host, _, port = config.ray_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _NOTICE_S).close()
    except OSError as error:
        raise _away(config, error) from error


def _away(config: ClusterConfig, error: BaseException) -> errors.Unavailable:
    return errors.Unavailable(
        f"Ray does not answer at {config.ray_address}: on the head run `flashmoe cluster head "
        f"FILE`, on every other box `flashmoe cluster join FILE` ({_short(error)})"
    )


class Members:
    """What Ray knows of our boxes. Every call asks it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    def present_hosts(self) -> set[str]:
        """Addresses of the boxes that Ray sees alive."""
        return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}

    def _away(self) -> list[AnyBox]:
        present = self.present_hosts()
        return [box for box in self._config.boxes if box.host not in present]

    def kept(self) -> list[str]:
        """Names of the boxes that have an actor, also of such as the file no longer names."""
        found = ray.util.list_named_actors(all_namespaces=True)
        return sorted(one["name"] for one in found if one["namespace"] == NAMESPACE)

    def check_present(self, say: Say) -> None:
        """Raises Unavailable naming every box that is not in Ray's cluster, nor comes soon."""
        deadline_s = time.monotonic() + _JOIN_S
        if away := self._away():
            say(f"waiting for {', '.join(box.name for box in away)}")
        while away := self._away():
            if time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
                continue
            names = ", ".join(f"{box.name} ({box.host})" for box in away)
            raise errors.Unavailable(
                f"Ray does not see {names}: run `flashmoe cluster join FILE --box NAME` there"
            )

    def bring_up(self, say: Say) -> None:
        """Have every box of the file run what the file says, and no other. A box whose order is
        the same is left alone; a stack that lives is adopted.

        Raises Unavailable, StartFailed with the reason of the first box that refused.
        """
        self.check_present(say)
        gone = set(self.kept()) - {box.name for box in self._config.boxes}
        for boxes in self._config.starts:
            for box in boxes:
                self._order(box, say)
            self._wait_serving(boxes, say)
        for name in sorted(gone):  # the main node does without it by now
            self.take_down(name, say)

    def take_down(self, name: str, say: Say) -> bool:
        """Stop the box's stack, and forget the box. Returns whether its stack is known to be
        stopped.
        """
        is_stopped = True
        if (actor := _actor(name)) is not None:
            is_stopped = self._stop(name, actor, say)
            ray.kill(actor, no_restart=True)
        _remove_group(name)
        return is_stopped

    def _stop(self, name: str, actor: Any, say: Say) -> bool:
        if (host := _host_of(name)) and host not in self.present_hosts():
            say(_unreached(name, f"no Ray runs at {host}"))
            return False
        try:
            has_run = ray.get(actor.stop.remote(), timeout=_STOP_S)
        except errors.FlashMoEError as error:  # as the box says; Ray puts lines around it
            say(f"{name}: {str(error).splitlines()[-1]}")
            return False
        except (RayActorError, GetTimeoutError) as error:
            say(_unreached(name, _short(error)))
            return False
        say(f"{name}: {'stopped' if has_run else 'nothing ran'}")
        return True

    def report(self, name: str) -> dict[str, Any]:
        """As `Keeper.report`, with how often Ray made the actor again. A box without actor, or
        whose actor does not answer, has a state and a reason only.
        """
        actor = _actor(name)
        if actor is None:
            return {"state": "absent", "reason": "`flashmoe cluster up FILE` starts it"}
        known = {"restarts": _num_restarts(actor)}
        try:
            found: dict[str, Any] = ray.get(actor.report.remote(), timeout=_ANSWER_S)
            return known | found
        except (RayActorError, GetTimeoutError) as error:
            return known | {"state": "away", "reason": _short(error)}

    def _order(self, box: AnyBox, say: Say) -> None:
        """An actor with this order, and nothing of the box left where it was before."""
        if _host_of(box.name) not in (None, box.host):
            self.take_down(box.name, say)
        order, actor = Order.of(self._config, box), _actor(box.name)
        if actor is not None:
            if _is_kept(actor, order):
                return
            _end(box.name, actor)
        say(f"{box.name}: on {box.host}")
        group = _group(box)
        made = ray.remote(Keeper).options(
            name=box.name,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=8,
            num_cpus=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        made.remote(order)

    def _wait_serving(self, boxes: Any, say: Say) -> None:
        waiting, deadline_s = list(boxes), time.monotonic() + _START_S
        while waiting:
            for box in list(waiting):
                found = self._state(box.name)
                if found["state"] == "failed":
                    raise errors.StartFailed(f"box {box.name}: {found['reason']}")
                if found["state"] == "serving":
                    say(f"{box.name}: serves")
                    waiting.remove(box)
            if time.monotonic() > deadline_s:
                names = ", ".join(box.name for box in waiting)
                raise errors.Unavailable(f"after {_START_S:.0f} s these do not serve yet: {names}")
            time.sleep(_POLL_S)

    def _state(self, name: str) -> dict[str, str]:
        actor = _actor(name)
        if actor is None:
            return {"state": "starting", "reason": ""}
        try:
            found: dict[str, str] = ray.get(actor.state.remote(), timeout=_START_S)
        except RayActorError as error:
            if "creation task" in str(error):
                return {"state": "failed", "reason": _short(error)}
            return {"state": "starting", "reason": ""}  # Ray makes it again
        return found


def _actor(name: str) -> Any:
    try:
        return ray.get_actor(name, NAMESPACE)
    except ValueError:
        return None


def _is_kept(actor: Any, order: Order) -> bool:
    try:
        if ray.get(actor.order.remote(), timeout=_ANSWER_S) != order:
            return False
        state = ray.get(actor.state.remote(), timeout=_ANSWER_S)["state"]
        return state in ("starting", "serving")
    except (RayActorError, GetTimeoutError):
        return False


def _end(name: str, actor: Any) -> None:
    """Of the actor, not of its stack."""
    ray.kill(actor, no_restart=True)
    deadline_s = time.monotonic() + _ANSWER_S
    while _actor(name) is not None:
        if time.monotonic() > deadline_s:
            raise errors.Unavailable(f"Ray does not end the actor of {name}: try again")
        time.sleep(_POLL_S)


def _num_restarts(actor: Any) -> int:
    from ray._private.state import actors  # the public list of actors needs Ray's dashboard

    return int(actors(actor._actor_id.hex())["NumRestarts"])


def _group(box: AnyBox) -> Any:
    """The placement group of the box: one for each, as a group cannot grow."""
    bundle = {f"node:{box.host}": _SHARE}
    if found := _group_of(box.name):
        if found["bundles"][0] == bundle:
            return ray.util.get_placement_group(box.name)
        _remove_group(box.name)
    made = placement_group([bundle], strategy="STRICT_PACK", name=box.name, lifetime="detached")
    if not made.wait(_CONNECT_S):
        raise errors.Unavailable(f"Ray has no place on {box.host} for {box.name}: is it alive?")
    return made


def _host_of(name: str) -> str | None:
    """Where the box was when it was ordered, also of one that the file no longer names."""
    found = _group_of(name)
    return str(next(iter(found["bundles"][0]))).removeprefix("node:") if found else None


def _unreached(name: str, why: str) -> str:
    return (
        f"{name}: Ray does not reach it, its daemons may still run: there `flashmoe cluster down "
        f"FILE --box {name}` ends them ({why})"
    )


def _group_of(name: str) -> dict[str, Any] | None:
    for found in placement_group_table().values():
        if found["name"] == name and found["state"] != "REMOVED":
            return dict(found)
    return None


def _remove_group(name: str) -> None:
    if _group_of(name) is None:
        return
    remove_placement_group(ray.util.get_placement_group(name))
    deadline_s = time.monotonic() + _ANSWER_S
    while _group_of(name) is not None and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
