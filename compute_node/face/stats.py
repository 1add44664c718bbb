"""What the node shows of itself; each counter is defined beside where it is counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from compute_node.boxes.box_facts import BoxFacts
from compute_node.boxes.boxes import Boxes
from compute_node.engine.compute_thread import ComputeThread
from compute_node.engine.engine import Engine
from compute_node.evidence import learning
from compute_node.evidence.advice import AdviceFeed
from compute_node.evidence.log import AccessLog
from compute_node.face.traffic import Traffic
from compute_node.kernels.counts import KernelCounts
from compute_node.quality.guards import Guards
from compute_node.run_ahead.run_ahead import RunAhead
from compute_node.store.borrow import StoreClient
from proto import stats
from proto import stats_pb2 as pb
from proto.stats import Absent, fact, gauge, labelled


@dataclass
class NodeStats:
    """access_log, advice: None without Redis."""

    engine: Engine
    compute: ComputeThread
    store: StoreClient
    access_log: AccessLog | None
    advice: AdviceFeed | None
    guards: Guards
    boxes: Boxes | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def snapshot(self) -> pb.Snapshot:
        cache, loaded = self.engine.cache, self.engine.loaded
        layers, distances = cache.counters.items(), enumerate(loaded.prefetcher.distances, start=1)
        foresight, stalls = loaded.prefetcher.foresight, [*loaded.timer.stalls.by_layer.items()]
        return stats.snapshot(
            self,
            self.traffic,
            *(labelled(counters, layer=layer) for layer, counters in layers),
            cache,
            cache.waits,
            cache.capacity,
            cache.chooser,
            self.compute.schedule,
            self.compute.turns.length,
            self.engine.room,
            *((self.boxes,) if self.boxes else ()),
            *(
                labelled(part, box=link.address)
                for link in (self.boxes.links if self.boxes else ())
                for part in (link, BoxFacts.of_link(link, loaded.spec))
            ),
            *(
                part
                for shadow in (self.engine.shadow,)
                if shadow is not None
                for part in (
                    labelled(shadow, shadow=shadow.link.address),
                    labelled(shadow.link, shadow=shadow.link.address),
                )
            ),
            self.engine.room.kept,
            *(labelled(distance, layers_ahead=number) for number, distance in distances),
            loaded.prefetcher,
            loaded.routers,
            foresight.misses,
            self.engine.run_ahead or Absent(RunAhead),
            self.engine.lossy,
            self.engine.exact_pass,
            self.engine.exact_pass.loans,
            *(labelled(guard, budget=guard.budget) for guard in self.guards),
            *(
                labelled(worth, predictor=predictor, layers_ahead=number)
                for predictor, number, worth in foresight.worths()
            ),
            *(labelled(causes, layer=layer) for layer, causes in stalls),
            labelled(KernelCounts.of(loaded.prober, native=True), kernel="native"),
            labelled(KernelCounts.of(loaded.prober, native=False), kernel="torch"),
            self.access_log or Absent(AccessLog),
            self.advice or Absent(AdviceFeed),
            self.store,
            self.engine,
            loaded,
        )

    @property
    @fact("of the model")
    def fingerprint(self) -> str:
        return self.engine.loaded.spec.fingerprint

    @property
    @fact("their format")
    def weights(self) -> str:
        return str(self.engine.loaded.spec.weight_format)

    @property
    @fact("why nothing is learned; empty: it is")
    def learning_obstacle(self) -> str:
        return learning.obstacle(self.access_log, self.advice)

    @property
    @gauge("flashmoe_node_learning", "1 while evidence leaves and advice comes")
    def is_learning(self) -> bool:
        return not self.learning_obstacle
