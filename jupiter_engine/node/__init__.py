"""The node runner: what Jupiter runs on every machine of the cluster, standard library only.

The package is packed into one file (see cluster.runner), copied to each node and started there
with whatever Python 3.9 or later the node has. It imports nothing of Jupiter and nothing that
has to be installed.
"""
