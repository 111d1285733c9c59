"""`barista node-labels`: this Kubernetes node's labels for `ray start --labels-file`."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def command(
    output: Path = typer.Option(..., metavar="FILE", help="Where the labels go, as YAML."),
    node: str = typer.Option(..., envvar="NODE_NAME", show_envvar=True, help="The node's name."),
) -> None:
    """Write what Kubernetes knows of a node, its GPUs and its zone, as labels of a Ray node.

    A node without such labels, or an API server that does not tell, is no error: the file is then an empty mapping.
    """
    import asyncio

    from router.kubernetes.node_labels import read_node_labels
    from router.log import log_to_stderr

    log_to_stderr("info")
    labels = asyncio.run(read_node_labels(node))
    # JSON is YAML; and an empty file would not be a mapping to Ray, which would refuse to start.
    output.write_text(json.dumps(labels, indent=2) + "\n")
    typer.echo(f"{node}: {len(labels)} labels in {output}")
