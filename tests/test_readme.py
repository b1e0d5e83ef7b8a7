"""What the README shows is what the code does. `make figure` rewrites its table and figure."""

import re
from pathlib import Path

from jaxrl_eff.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FILES = {
    "main": "main.py",
    **{word: f"cli/{word}.py" for word in COMMANDS},
}


def ppo_graph():
    """PPO as its config's defaults make it, for a model of any shape."""
    from jaxrl_eff.algorithms import Rollout, ppo
    from jaxrl_eff.models import LMConfig
    from jaxrl_eff.rollout import Sampling

    sizes = {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn": 8}
    lm = LMConfig(vocab=16, **sizes)
    value = LMConfig(vocab=16, **sizes, head="value")
    sampling = Sampling(max_tokens=8)
    models = {"actor": lm, "critic": value, "reward": value}
    return ppo.graph(ppo.PPOConfig(), models, Rollout(sampling))


def table(graph) -> str:
    """The calls as a Markdown table, in the order in which they run."""
    from jaxrl_eff import core

    lines = ["| call | kind | model | reads | writes |", "|---|---|---|---|---|"]
    for c in core.order(graph):
        names = f"`{c.name}` | {c.kind} | {c.of or ''}"
        lines.append(f"| {names} | {' '.join(c.reads)} | {' '.join(c.writes)} |")
    return "\n".join(lines)


def figure(graph) -> str:
    """The graph as a Mermaid block."""
    from jaxrl_eff import core

    return f"```mermaid\n{core.draw(graph)}\n```"


def between(text: str, mark: str) -> str:
    """What stands between `<!-- MARK -->` and `<!-- /MARK -->`."""
    return re.search(rf"<!-- {mark} -->\n(.*?)\n?<!-- /{mark} -->", text, re.DOTALL)[1]


def commands() -> list[str]:
    """The commands in the README's blocks, one a line, without comments."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def test_table_and_figure_are_current():
    text, graph = README.read_text(), ppo_graph()
    for mark, wanted in (("ppo-table", table(graph)), ("ppo-figure", figure(graph))):
        assert between(text, mark) == wanted, "run `make figure`"


def test_links_resolve():
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text()
        anchors = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
                   for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}  # fmt: skip
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, f"{document} links to {target}"
            elif not target.startswith("https://"):
                assert (ROOT / target.split("#")[0]).exists(), f"{document} links to {target}"


def test_paths_in_backticks_exist():
    """Names of files and folders of this repository, such as `jaxrl_eff/train/loop.py`."""
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        tops = r"(?:jaxrl_eff|configs|tests|colab|experiments|\.ci)"
        for path in re.findall(rf"`({tops}/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{document} names {path}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"(?m)(?:^|`)make ([a-z-]+)", (ROOT / document).read_text()):
            assert target in targets, f"{document} says make {target}"


def test_programs_and_flags_exist():
    sources = {m: (ROOT / "jaxrl_eff" / path).read_text() for m, path in FILES.items()}
    seen = set()
    for line in commands():
        for module in re.findall(r"-m jaxrl_eff[. ](\w+)", line):
            assert module in FILES, f"{line!r} runs {module}"
            seen.add(module)
            flags = re.findall(r"--([a-z_]+)", re.split(rf"jaxrl_eff[. ]{module}", line)[1])
            for flag in flags:
                pattern = rf'"--{flag}"|DEFINE_\w+\(\s*"{flag}"'
                found = re.search(pattern, sources[module])
                assert found, f"{line!r}: {module} has no flag --{flag}"
    assert seen == set(FILES)


def test_configs_take_the_arguments_and_have_the_fields(monkeypatch):
    from jaxrl_eff.train import config_file, settings

    monkeypatch.chdir(ROOT)
    seen = 0
    for line in commands():
        for config in re.findall(r"--config=(\S+)", line):
            changes = re.findall(r"--config\.(\S+=\S+)", line)
            assert settings.run(config_file.load(config, changes)).stages, line
            seen += 1
    assert seen >= 3


def rewrite() -> None:
    """Puts the current table and figure into the README."""
    text, graph = README.read_text(), ppo_graph()
    for mark, wanted in (("ppo-table", table(graph)), ("ppo-figure", figure(graph))):
        block = f"<!-- {mark} -->\n{wanted}\n<!-- /{mark} -->"
        text = re.sub(
            rf"<!-- {mark} -->.*?<!-- /{mark} -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
    README.write_text(text)


if __name__ == "__main__":
    rewrite()
