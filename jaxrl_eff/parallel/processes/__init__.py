"""Control connections between the processes of a run, over TCP.

JAX's distributed service detects failures too, but late, and it terminates processes from within
C++ with pages of output; its collectives wait for a failed process. With these connections

- all processes connect within a timeout, or the run ends with a list of the missing ones (`meet`);
- if a process dies, or is silent for that long, the others end with a one-line error;
- an error in one process is sent to the others, which would otherwise wait in a collective;
- strings are exchanged without using devices, from any thread (`Group.exchange`).
"""

from jaxrl_eff.parallel.processes.group import GRACE, Group, group, joined
from jaxrl_eff.parallel.processes.link import PeerLost
from jaxrl_eff.parallel.processes.meeting import Place, differences, meet

__all__ = ["GRACE", "Group", "PeerLost", "Place", "differences", "group", "joined", "meet"]
