"""Steps of real sizes, written by hand, for the tests of the search."""

from sized import sized

from jaxrl_eff.planner.problem import Lengths, Problem, Role, Work

SIZES = {  # layers, width, heads, kv_heads, head_dim, ffn, vocab
    "1b": (16, 2048, 32, 8, 64, 8192, 32000),
    "7b": (32, 4096, 32, 32, 128, 11008, 32000),
    "13b": (40, 5120, 40, 40, 128, 13824, 32000),
    "70b": (80, 8192, 64, 8, 128, 28672, 32000),
}


def role(size, *, trained=False, value=False):
    half = dict(dtype="bfloat16", param_dtype="bfloat16", remat="full")
    lm = sized(*SIZES[size], head="value" if value else "lm", **half)
    return Role(lm, opt_bytes=12.0 * trained, grad_bytes=4.0 * trained)


def generate(name, rows, prompt, new, writes, samples=1, staleness=0):
    return Work(
        name, "generate", "actor", rows, writes=writes, prompts=rows // samples, prompt=prompt,
        length=prompt + new, max_new=new, responses=Lengths.all(new), staleness=staleness,
    )  # fmt: skip


def infer(name, model, rows, length, reads, writes):
    return Work(name, "infer", model, rows, (reads,), (writes,), length=length)


def train(name, model, rows, length, reads, minibatches):
    reads = tuple(reads.split())
    return Work(name, "train", model, rows, reads, length=length, minibatches=minibatches)


def local(rows, reads, writes="adv"):
    reads, writes = tuple(reads.split()), tuple(writes.split())
    return Work("advantage", "local", None, rows, reads, writes, seconds=1e-3)


def ppo(actor="7b", critic="7b", *, rows=512, prompt=128, new=384, minibatches=4, staleness=0):
    length = prompt + new
    works = (
        generate("actor_gen", rows, prompt, new, ("tokens", "logp"), staleness=staleness),
        infer("rew_inf", "reward", rows, length, "tokens", "score"),
        infer("ref_inf", "ref", rows, length, "tokens", "ref_logp"),
        infer("critic_inf", "critic", rows, length, "tokens", "value"),
        local(rows, "tokens logp score ref_logp value", "adv ret"),
        train("actor_train", "actor", rows, length, "tokens adv", minibatches),
        train("critic_train", "critic", rows, length, "tokens ret", minibatches),
    )
    roles = {
        "actor": role(actor, trained=True), "critic": role(critic, trained=True, value=True),
        "ref": role(actor), "reward": role(critic, value=True),
    }  # fmt: skip
    return Problem(works, roles, {"tokens": 12.0 * rows * length})


def grpo(actor="7b", *, rows=256, prompt=256, new=768, minibatches=2, staleness=0, samples=8):
    length = prompt + new
    works = (
        generate("actor_gen", rows, prompt, new, ("tokens", "logp"), samples, staleness),
        infer("ref_inf", "ref", rows, length, "tokens", "ref_logp"),
        local(rows, "tokens logp ref_logp"),
        train("actor_train", "actor", rows, length, "tokens adv", minibatches),
    )
    roles = {"actor": role(actor, trained=True), "ref": role(actor)}
    return Problem(works, roles, {"tokens": 12.0 * rows * length})


def remax(actor="7b", *, rows=128, prompt=128, new=384):
    length = prompt + new
    works = (
        generate("actor_gen", rows, prompt, new, ("tokens", "logp")),
        generate("greedy_gen", rows, prompt, new, ("greedy_tokens",)),
        infer("rew_inf", "reward", rows, length, "tokens", "score"),
        infer("greedy_rew_inf", "reward", rows, length, "greedy_tokens", "greedy_score"),
        local(rows, "tokens logp score greedy_score"),
        train("actor_train", "actor", rows, length, "tokens adv", 1),
    )
    roles = {"actor": role(actor, trained=True), "reward": role("1b", value=True)}
    return Problem(works, roles, {"tokens": 12.0 * rows * length})
