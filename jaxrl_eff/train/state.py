"""The state of a run: the models of the current stage, and those that later stages need.

Model parameters are initialized randomly, from a Hugging Face directory, or from an earlier stage.
Random ones depend only on the run's seed and the shape, never on the mesh.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff import tree
from jaxrl_eff.core import Adaptation, Model, Step
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.parallel import Placement, Route, global_arrays
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.peft import quantized, ways, weights
from jaxrl_eff.train import parts
from jaxrl_eff.train.assembly import Assembled, Stage
from jaxrl_eff.train.start import started

Models = dict[str, Model]
Shelf = dict[str, Any]  # "stage/role" -> parameters, at home in that stage
_RENAMED = {"past": "stale", "left": "error_feedback", "held": "node_copy"}  # fields of `Model`


def initial(assembled: Assembled, stage: Stage, shelf: Shelf) -> Models:
    """Returns the initial models of a stage, at home. Copies, since training donates them."""
    return {
        role: stage.step.init(role, _params(assembled, stage, role, shelf))
        for role in stage.step.graph.models
    }


def _params(assembled: Assembled, stage: Stage, role: str, shelf: Shelf) -> Any:
    """Returns the initial parameters of a role at home, including those of an adapter."""
    where = jax.tree.map(lambda x: x.sharding, stage.step.home(role).params)
    way = stage.step.specs[role].tx
    if role not in stage.settings.adapt or not isinstance(way, Adaptation):
        return _base(assembled, stage, role, shelf, where)
    kept, there = ways.kept_in_bits(stage.settings.adapt[role], stage.lms[role]), tree.flat(where)
    plain_where = quantized.layout(weights.base(stage.step.specs[role].view(where)))
    base = _base(assembled, stage, role, shelf, plain_where, kept and _Keep(kept, there))
    full = jax.jit(way.extended, out_shardings=where, donate_argnums=0)(base)
    given = started(stage.settings.adapt[role], stage.lms[role])
    put = {k: global_arrays.from_whole(there[k], np.asarray(v)) for k, v in given.items()}
    return tree.with_leaves(full, put)


class _Keep(NamedTuple):
    """Quantizer of parameters one by one, as they are read.

    Attributes:
        kept: the quantized kernels, and their format.
        where: name of a stored leaf -> its sharding.
    """

    kept: quantized.BaseFormat
    where: dict[str, Any]

    def __call__(self, name: str, x: jax.Array) -> dict[str, jax.Array]:
        if name not in self.kept.blocks:
            return {name: x}
        there = {k: self.where[k] for k in self.kept.names(name)}
        return jax.jit(lambda x: self.kept.leaves(name, x), out_shardings=there)(x)


def _base(
    assembled: Assembled, stage: Stage, role: str, shelf: Shelf, where: Any, keep: Any = None
) -> Any:
    """Returns parameters without an adapter at home; with a `_Keep`, their stored leaves."""
    kind, name = stage.origins[role]
    if kind == "own":
        algorithm = parts.algorithm_of(stage.settings)
        made = algorithm.own[role].init(parts.loss_of(stage.settings, stage.name))
        return jax.device_put(made, where)
    lm = stage.lms[role]
    if kind == "stage":
        source = _stage(assembled, name.split("/")[0])
        return _kept(_adapted(shelf[name], source.lms[name.split("/")[1]], lm, where), keep)
    directory = assembled.run.model.path if kind == "base" else name
    if directory:
        from jaxrl_eff.checkpoints import load_hf

        ignore = assembled.run.model.ignore
        return load_hf(directory, lm, where, dtype=lm.param_dtype, keep=keep, ignore=ignore)
    key = jax.random.key(assembled.run.seed)
    return _kept(jax.jit(lambda k: params.init(lm, k), out_shardings=where)(key), keep)


def _kept(params_: Any, keep: _Keep | None) -> Any:
    """Applies `keep` to parameters, freeing each one afterwards."""
    if keep is None:
        return params_
    found, flat = {}, tree.flat(params_)
    del params_
    for name in list(flat):
        found |= keep(name, flat.pop(name))
    return tree.with_leaves({}, found)


def merged(lm: LMConfig, params_: Any) -> Any:
    """Returns parameters with adapters merged into dequantized kernels; others unchanged."""
    there = weights.base(weights.assembled(lm, params_))
    where = quantized.layout(jax.tree.map(lambda x: x.sharding, there))
    if jax.tree.structure(where) == jax.tree.structure(params_):
        return params_
    return jax.jit(lambda t: weights.merged(lm, t), out_shardings=where)(params_)


def moved(models: Models, old: Step, new: Step) -> Models:
    """Moves models from their homes in one step's plan to those in another's. Donates them."""
    out = {}
    for role in list(models):
        out[role] = Route(old.home(role), new.home(role), donate=True)(models.pop(role))
    return out


def shared(tree: Any) -> Any:
    """Returns the tree with a part on every process, as file writers need it.

    Arrays that are not on all processes are sharded over all devices. Every process must call.
    """
    return Route(tree, shared_layout(tree))(tree)


def shared_layout(tree: Any) -> Any:
    """Returns the layouts of `shared`, for arrays or `jax.ShapeDtypeStruct`s with shardings."""

    def layout(x: Any) -> jax.ShapeDtypeStruct:
        everywhere = {d.process_index for d in x.sharding.device_set}
        whole = len(everywhere) == jax.process_count()
        where = x.sharding if whole else _spread(x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(layout, tree)


def _spread(shape: tuple[int, ...]) -> NamedSharding:
    """Returns a sharding over all devices along the first axis that divides; else replicated."""
    every = Placement(tuple(range(jax.device_count())))
    axis = next((i for i, n in enumerate(shape) if n % jax.device_count() == 0 and n), None)
    spec = PartitionSpec(*[None] * axis, "data") if axis is not None else PartitionSpec()
    return NamedSharding(mesh(every), spec)


def _stage(assembled: Assembled, name: str) -> Stage:
    return next(s for s in assembled.stages if s.name == name)


def _adapted(tree: Any, source: LMConfig, target: LMConfig, where: Any) -> Any:
    """Converts parameters of one stage for a role of another: moves, copies, changes the head.

    A new value head is initialized to 0, so that a new critic or reward model returns 0.
    """
    tree = dict(merged(source, tree))
    if source.head != target.head:
        tree.pop("unembed", None)
        tree["value"] = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), params.abstract(target)["value"]
        )
    shared = {k: v for k, v in tree.items() if k != "value" or source.head == target.head}
    moved = Route(jax.tree.map(lambda x: x.sharding, shared), {k: where[k] for k in shared})(shared)
    fresh = {k: jax.device_put(tree[k], where[k]) for k in tree if k not in shared}
    copy = jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=where)
    return copy({**moved, **fresh})


def abstract(assembled: Assembled, index: int) -> dict[str, Any]:
    """Returns shapes and shardings of the state of stage `index`."""
    stage = assembled.stages[index]
    shelf = {}
    for name in assembled.needed_after(index):
        owner, role = name.split("/")
        if owner != stage.name:
            shelf[name] = _stage(assembled, owner).step.home(role).params
    return {
        "models": {r: stage.step.home(r) for r in stage.step.graph.models},
        "shelf": shelf,
    }


def saved(assembled: Assembled, index: int, models: Models, shelf: Shelf) -> dict[str, Any]:
    """Returns the state of stage `index` as described by `abstract`.

    Models that only this stage started from are left out: a run resumed in it no longer has them,
    and its checkpoints should be the same.
    """
    later = assembled.needed_after(index)
    return {"models": models, "shelf": {k: v for k, v in shelf.items() if k in later}}


def renamed(leaf: str) -> str:
    """Returns a leaf's name in `abstract`, from its name in this or an older checkpoint."""
    names = leaf.split("/", 3)
    if names[0] == "models" and len(names) == 4:
        names[2] = _RENAMED.get(names[2], names[2])
    return "/".join(names)


def shelve(assembled: Assembled, index: int, models: Models, shelf: Shelf) -> Shelf:
    """Returns the models to keep after stage `index`: those that later stages start from."""
    mine = {f"{assembled.stages[index].name}/{r}": m.params for r, m in models.items()}
    return {name: {**shelf, **mine}[name] for name in assembled.needed_after(index)}
