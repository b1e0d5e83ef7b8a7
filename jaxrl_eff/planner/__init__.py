"""Plans from a cost model: predicts the time of a step and finds the best placement of its calls.

`from_graph` turns a graph into a `Problem`, `clusters` describes hardware, `cost` prices calls and
edges, `simulate` schedules a plan, `search` finds one, and `measured` adjusts prices to
measurements. Only `clusters.local` uses a device: it measures.
"""
