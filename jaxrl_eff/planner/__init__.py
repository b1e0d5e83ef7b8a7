"""Plans from a cost model: predicts the time of a step and finds the best placement of its calls.

`from_graph` turns a graph into a `Problem`, `clusters` describes hardware, `cost` prices calls and
edges, `simulate` schedules a plan, `search` finds one, and `measured` adjusts prices to
measurements. Only `clusters.local` uses a device: it measures. The names below are public,
everything else is private; `jaxrl_eff.search` and `jaxrl_eff.simulate` are the functions of the
modules with these names.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "clusters": ("Cluster",),
        "from_graph": ("works",),
        "problem": ("Lengths", "Problem"),
    },
    modules=("clusters", "corrections", "measured", "search", "simulate"),
)
