"""The processes of a run, joined by lines of text over TCP.

JAX's own service could tell the same, but it ends a process from within C++, late and with pages of
text, and its collectives wait for a process that has failed. Here

- everybody is there within the time to wait, or the run ends and says who is missing (`meet`);
- a process that dies, or is silent for that long, ends the others with one line;
- an error of one process is told to the others, which would wait for it in a collective;
- texts are exchanged without the devices, from any thread (`Group.exchange`).
"""

from jaxrl_eff.parallel.processes.group import GRACE, Group, group, joined
from jaxrl_eff.parallel.processes.link import PeerLost
from jaxrl_eff.parallel.processes.meeting import Place, differences, meet

__all__ = ["GRACE", "Group", "PeerLost", "Place", "differences", "group", "joined", "meet"]
