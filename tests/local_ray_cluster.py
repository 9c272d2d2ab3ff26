"""A Ray cluster on this machine, in a process of its own: a head without CPUs, nodes of one CPU.

Prints the address, and then does what it is told by lines on standard input: "lose PID" kills the
node whose worker that process is, and puts another one in its place.
"""

import sys

from ray.cluster_utils import Cluster

_NODES = 2


def parent_of(process: int) -> int:
    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def lose(cluster: Cluster, process: int) -> None:
    raylet = parent_of(process)
    for node in list(cluster.worker_nodes):
        raylets = node.all_processes["raylet"]
        if any(info.process.pid == raylet for info in raylets):
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1)
            print("lost", flush=True)
            return
    print(f"process {process} is of no node", flush=True)


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(_NODES):
        cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        lose(cluster, int(line.split()[1]))
    cluster.shutdown()


if __name__ == "__main__":
    main()
