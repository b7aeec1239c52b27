"""What each GPU sends in an optimizer step, and how long that takes at given bandwidths.

Enters: a load, a setting, a cluster. Leaves: `Transfer`s. Bytes are those of the tensors that go into a collective; on
a ring of S GPUs each GPU sends (S − 1)/S of them in an all-gather or a reduce-scatter, twice that in an all-reduce
(Patarasu & Yuan 2009). Left out: latency, what is hidden behind computation, counts and metrics (less than a kilobyte a
step).
"""

from __future__ import annotations

from dataclasses import dataclass

from loopos.cli.planning.cluster.hardware import Cluster
from loopos.cli.planning.cluster.memory import activation_number_bytes, divided, number_bytes
from loopos.cli.planning.cluster.setting import Setting
from loopos.cli.planning.cluster.work import Load, Network

_FP32 = 4
ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
# Collectives of activations in a layer under tensor parallelism: behind attention and behind the feed-forward layers.
_JOINTS = 2


@dataclass(frozen=True, slots=True)
class Transfer:
    """`size`: bytes of the tensors that one GPU brings through this collective; among `group` GPUs, every `stride`-th
    one. `what`: whose bytes.
    """

    collective: str
    what: str
    size: int
    group: int
    stride: int

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends on a ring."""
        ways = 2 if self.collective == ALL_REDUCE else 1
        return ways * self.size * (self.group - 1) / self.group

    def seconds(self, cluster: Cluster) -> float:
        """The time of it, with nothing else to do."""
        return cluster.ring_seconds(self.sent, size=self.group, stride=self.stride)

    def told(self, cluster: Cluster) -> dict[str, object]:
        """As one JSON object."""
        return {
            "collective": self.collective,
            "what": self.what,
            "bytes": self.size,
            "sent": round(self.sent),
            "group": self.group,
            "seconds": self.seconds(cluster),
        }


def step_transfers(load: Load, setting: Setting, cluster: Cluster) -> list[Transfer]:
    """The collectives of one optimizer step."""
    passes = load.accumulation * setting.splits
    found = [each for network in load.trained for each in _of_weights(network, load, setting, cluster, passes)]
    if setting.tensor_parallel > 1:
        found += [_of_activations(network, load, setting) for network in load.trained if network.has_own_pass]
    return [each for each in found if each.group > 1 and each.size > 0]


def iteration_transfers(load: Load, setting: Setting, cluster: Cluster) -> list[Transfer]:
    """Those of an iteration of PPO beside its optimizer steps: every role is gathered once, and kept while responses
    are written and scored.
    """
    if not load.writes_responses:
        return []
    size, stride = number_bytes(load), setting.tensor_parallel
    found = [
        Transfer(
            ALL_GATHER,
            f"weights of the {network.role}",
            size * divided(network, setting.tensor_parallel).total,
            setting.shard_size,
            stride,
        )
        for network in load.networks
    ]
    return [each for each in found if each.group > 1 and each.size > 0]


def divided_whole(network: Network, setting: Setting) -> int:
    """Parameters that one GPU of a tensor-parallel group gathers for a pass of a role."""
    if setting.tensor_parallel == 1 or not network.has_own_weights:
        return network.model.parameters.total
    return divided(network, setting.tensor_parallel).total


def _of_weights(network: Network, load: Load, setting: Setting, cluster: Cluster, passes: int) -> list[Transfer]:
    """Weights gathered, gradients summed. Replicated, gradients are summed once a step, in fp32: 4·R. Sharded, every
    pass gathers the weights, f·P, and the layers again for its backward half unless they were kept, and reduces 4·R;
    groups that share weights sum their parts of the gradients, 4·R/S.
    """
    stride, copies = setting.tensor_parallel, setting.copies(cluster)
    trained = _FP32 * divided(network, setting.tensor_parallel).trained
    gradients = f"gradients of the {network.role}"
    if setting.mode == "replicate":
        return [Transfer(ALL_REDUCE, gradients, trained, copies, stride)]
    shards = setting.shard_size
    whole, outside = network.parameters.total, network.parameters.total
    if network.has_own_pass:
        whole, outside = divided_whole(network, setting), network.model.units.outside
    again = (whole - outside) * network.model.shape.layers // network.model.num_layers
    gathered = number_bytes(load) * (whole + (again if setting.reshard_after_forward else 0))
    return [
        Transfer(ALL_GATHER, f"weights of the {network.role}", passes * gathered, shards, stride),
        Transfer(REDUCE_SCATTER, gradients, passes * trained, shards, stride),
        Transfer(ALL_REDUCE, gradients, passes * trained // shards, copies // shards, stride * shards),
    ]


def _of_activations(network: Network, load: Load, setting: Setting) -> Transfer:
    """Hidden states and their gradients, T · d · f, summed behind attention and feed-forward layers of each layer."""
    tokens = load.tokens // setting.splits
    times = _JOINTS * (3 if setting.checkpointing else 2) * network.model.num_layers
    size = tokens * network.model.shape.width * activation_number_bytes(load)
    passes = load.accumulation * setting.splits
    return Transfer(ALL_REDUCE, f"activations of the {network.role}", passes * times * size, setting.tensor_parallel, 1)
