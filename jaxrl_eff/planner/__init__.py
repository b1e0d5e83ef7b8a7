"""Plans from a cost model: what a step costs where, and which placement of its calls is best.

`works` turns a graph into a `Problem`, `hardware` names clusters, `cost` prices calls and edges,
`simulate` schedules a plan, `search` finds one, `profile` corrects prices by measurements. None of
it touches a device, but for `hardware.local`, which measures.
"""
