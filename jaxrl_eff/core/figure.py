"""The diagram of a graph of calls, as Mermaid text."""

from jaxrl_eff.core.graph import Graph, order


def draw(graph: Graph) -> str:
    """Draws the graph as Mermaid text: one box per call, arrows labeled with arrays.

    Dotted arrows are weights: from the call that trains a model to those that use it afterwards.

    Example:
        >>> from jaxrl_eff import Graph, core
        >>> call = core.local("double", fn=lambda batch, key: {}, reads="x", writes="y")
        >>> print(core.draw(Graph("x", (call,))))
        graph LR
          data[("data")]
          double("double")
          data -- x --> double
    """
    calls = order(graph)
    writer = {k: c.name for c in calls for k in c.writes}
    writer |= dict.fromkeys(graph.inputs.split(), "data")
    shape = {"generate": '(["{}"])', "infer": '["{}"]', "train": '[["{}"]]', "local": '("{}")'}
    lines = ["graph LR", '  data[("data")]']
    for c in calls:
        label = f"{c.name}<br/>{c.kind} {c.of}" if c.of else c.name
        lines.append(f"  {c.name}{shape[c.kind].format(label)}")
    for c in calls:
        carried: dict[str, list[str]] = {}
        for k in c.reads:
            carried.setdefault(writer[k], []).append(k)
        lines += [f"  {src} -- {', '.join(ks)} --> {c.name}" for src, ks in carried.items()]
    for t in calls:
        if t.kind == "train":
            for c in calls:
                if c.of == t.of and c is not t:
                    old = f", {c.staleness} steps old" if c.staleness else ""
                    old += f", {c.weights}" if c.weights else ""
                    lines.append(f"  {t.name} -. {t.of}{old} .-> {c.name}")
    return "\n".join(lines)
