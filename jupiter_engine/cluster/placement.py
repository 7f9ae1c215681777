"""Who does what: from the cluster's settings and a machine's facts to a launch; pure."""

from __future__ import annotations

from jupiter_engine.cluster.probe import choose_twin
from jupiter_engine.errors import NoUsableNode
from jupiter_engine.protocol.specs import LaunchSpec
from jupiter_engine.settings.cluster import ClusterSettings, local_roles


def require_duties(cluster: ClusterSettings) -> None:
    """NoUsableNode unless this machine may do everything that a cycle needs."""
    missing = {"generate", "train", "evaluate"} - local_roles(cluster)
    if missing:
        raise NoUsableNode(
            f"no node of config/cluster.yaml that this version can use may {' or '.join(sorted(missing))}",
            fix="give the node with host: localhost the role `hybrid`",
        )


def launch_spec(cluster: ClusterSettings) -> LaunchSpec:
    """How the training ranks start on this machine; `auto` follows the hardware."""
    launch = cluster.launch
    twin = choose_twin() if launch.twin == "auto" else launch.twin
    if launch.launcher != "auto":
        launcher = launch.launcher
    elif launch.ranks == 1:
        launcher = "in_process"
    else:
        launcher = "mlx.launch" if twin == "mlx" else "torchrun"
    return LaunchSpec(twin=twin, ranks=launch.ranks, launcher=launcher, threads_per_rank=launch.threads_per_rank)
