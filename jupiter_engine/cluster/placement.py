"""Who does what on the machines of the cluster."""

from __future__ import annotations

from jupiter_engine.errors import NoUsableNode
from jupiter_engine.settings.cluster import ClusterSettings, local_roles


def require_duties(cluster: ClusterSettings) -> None:
    """NoUsableNode unless this machine may do everything that a cycle needs."""
    missing = {"generate", "train", "evaluate"} - local_roles(cluster)
    if missing:
        raise NoUsableNode(
            f"no node of config/cluster.yaml that this version can use may {' or '.join(sorted(missing))}",
            fix="give the node with host: localhost the role `hybrid`",
        )
