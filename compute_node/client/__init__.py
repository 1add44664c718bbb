"""What a Python user imports: `from compute_node.client import NodeClient`.

The one package of ours that names what it holds: its address is public and outlives its files.
"""

from compute_node.client.node_client import NodeClient as NodeClient
